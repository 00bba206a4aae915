"""Errors that say that MLflow, or the store of its files, refuses access: they are a person's to mend, and no bug.

A token may have expired while a run trained, or the rights may not go as far as the experiment or the model.
"""

import re
import sys
from collections.abc import Iterator

_WORDS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
"""MLflow's."""
_STATUS = (401, 403)
_OF_STORES = ("ExpiredToken", "InvalidToken")
"""What S3 says with another status."""
_OF_DATABASES = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|permission denied"
    r"|(database|role) \S+ does not exist|access denied for user|is not allowed to connect|unknown database"
    r"|login failed for user|attempt to write a readonly database",
    re.IGNORECASE,
)
"""What PostgreSQL, MySQL, SQL Server and SQLite say under the same kind of error as that nobody answers."""


def is_denial(error: BaseException) -> bool:
    """Whether the error, or what it was raised from, says that whoever asks may not do that."""
    kinds = (_of_mlflow, _of_its_files, _of_a_store, _of_a_database)
    return any(kind(cause) for cause in causes(error) for kind in kinds)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        # MLflow raises its own error inside `except`, without `from`.
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _of_mlflow(error: BaseException) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code in _WORDS


def _of_its_files(error: BaseException) -> bool:
    """Whether a server that passes files on says so."""
    import requests

    return isinstance(error, requests.HTTPError) and getattr(error.response, "status_code", None) in _STATUS


def _of_a_store(error: BaseException) -> bool:
    """Whether boto3 says so."""
    if "botocore" not in sys.modules:
        return False
    from botocore import exceptions

    if not isinstance(error, exceptions.ClientError):
        return isinstance(error, exceptions.NoCredentialsError)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in _STATUS or error.response.get("Error", {}).get("Code") in _OF_STORES


def _of_a_database(error: BaseException) -> bool:
    """Whether a database says so."""
    import sqlite3

    from sqlalchemy import exc

    kinds = (exc.OperationalError, exc.ProgrammingError, sqlite3.OperationalError)
    # Its own words: SQLAlchemy's have the statement and its values too.
    return isinstance(error, kinds) and _OF_DATABASES.search(str(getattr(error, "orig", error))) is not None
