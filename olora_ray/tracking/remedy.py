"""Errors of MLflow, of its database and of the store of its files that a person must mend, and what to do about each.

None of them passes by itself. A token may have expired while a run trained, or the rights may not go as far as the
experiment or the model; a proxy may refuse what is larger than its limit.
"""

import re
import sys
from collections.abc import Iterator

from olora_ray.common.connections import TRUST, UNTRUSTED

_WORDS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
"""MLflow's."""
_STATUS = (401, 403)
_TOO_LARGE = 413
_OF_STORES = ("ExpiredToken", "InvalidToken")
"""What S3 says with another status."""
_OF_DATABASES = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|permission denied"
    r"|(database|role) \S+ does not exist|access denied for user|is not allowed to connect|unknown database"
    r"|login failed for user|attempt to write a readonly database",
    re.IGNORECASE,
)
"""What PostgreSQL, MySQL, SQL Server and SQLite say under the same kind of error as that nobody answers."""
_FULL = re.compile(r"database or disk is full|No space left on device|disk quota exceeded", re.IGNORECASE)
"""What SQLite, PostgreSQL and the operating system say, at first hand or in a server's answer."""


def remedy(error: BaseException) -> str | None:
    """Return what is wrong and what to do, or None for an error that may pass or that nobody expects."""
    for cause in causes(error):
        if UNTRUSTED.search(str(cause)):
            return TRUST
        if _FULL.search(str(cause)) and getattr(cause, "errno", None) is None:  # else it is this machine's own disk
            return "the disk there is full; make room, and run the same command again"
        if _status(cause) == _TOO_LARGE:
            return (
                "the server, or a proxy before it, takes no file of this size (HTTP 413); raise its limit to the size"
                " of the largest model file (nginx: client_max_body_size), and run the same command again"
            )
        if _is_denial(cause):
            return "access is refused; correct the credentials or what they may do, and run the same command again"
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, the error that it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        # MLflow raises its own error inside `except`, without `from`.
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that a server of files answered with."""
    import requests

    found = getattr(error.response, "status_code", None) if isinstance(error, requests.HTTPError) else None
    return found if isinstance(found, int) else None


def _is_denial(error: BaseException) -> bool:
    from mlflow.exceptions import MlflowException

    of_mlflow = isinstance(error, MlflowException) and error.error_code in _WORDS
    return of_mlflow or _status(error) in _STATUS or _of_a_store(error) or _of_a_database(error)


def _of_a_store(error: BaseException) -> bool:
    """True if boto3 says that access is denied."""
    if "botocore" not in sys.modules:
        return False
    from botocore import exceptions

    if not isinstance(error, exceptions.ClientError):
        return isinstance(error, exceptions.NoCredentialsError)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in _STATUS or error.response.get("Error", {}).get("Code") in _OF_STORES


def _of_a_database(error: BaseException) -> bool:
    """True if a database says that access is denied."""
    import sqlite3

    from sqlalchemy import exc

    kinds = (exc.OperationalError, exc.ProgrammingError, sqlite3.OperationalError)
    # Its own words: SQLAlchemy's have the statement and its values too.
    return isinstance(error, kinds) and _OF_DATABASES.search(str(getattr(error, "orig", error))) is not None
