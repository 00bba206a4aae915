"""MLflow's clients, one per server or database, and the test whether MLflow answers.

MLflow asks an HTTP server for minutes by default (7 retries of up to 120 s) and a SQLite database that is
locked for 20 s per statement. Here a server gets two tries of 8 s, and a database is asked by a probe first.
"""

import fcntl
import logging
import os
import re
import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from olora_ray.common import patience
from olora_ray.common.errors import TryAgain, UserError, first_line
from olora_ray.common.patience import TRUST, UNTRUSTED
from olora_ray.common.secrets import mask

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Errors of MLflow, of its database and of the store of its files that a person must mend, and what to do about each.


_STATUS = (401, 403)
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
        if _status(cause) == 413:
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
    """True if MLflow, a server of files, an object store or a database says that access is denied."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy import exc

    if isinstance(error, MlflowException):
        return error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
    if isinstance(error, exc.OperationalError | exc.ProgrammingError | sqlite3.OperationalError):
        # The database's own words: SQLAlchemy's have the statement and its values too.
        return _OF_DATABASES.search(str(getattr(error, "orig", error))) is not None
    if "botocore" in sys.modules:  # boto3 is optional
        from botocore import exceptions

        if isinstance(error, exceptions.ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = error.response.get("Error", {}).get("Code")
            return status in _STATUS or code in ("ExpiredToken", "InvalidToken")  # these come with another status
        if isinstance(error, exceptions.NoCredentialsError):
            return True
    return _status(error) in _STATUS


_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_PROBE_SECONDS = 5.0
_asked: set[str] = set()
_TIMEOUT, _SHORT = "MLFLOW_HTTP_REQUEST_TIMEOUT", "8"
_SETTINGS = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # One retry: a kept connection that the server has closed meanwhile is no failure.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    _TIMEOUT: _SHORT,
}
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST")


class TrackingUnavailable(TryAgain):
    """MLflow does not answer now; the same call may work later."""


def check(uri: str) -> None:
    """Raise UserError within seconds if no MLflow server or database answers at `uri`.

    It is a TrackingUnavailable where it may answer later, and a plain UserError where the address is wrong.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        _ask(uri)
    except ModuleNotFoundError as error:
        install = ": pip install 'olora-ray[postgresql]'" if urlsplit(uri).scheme == "postgresql" else ""
        raise UserError(f"tracking.uri={shown_uri(uri)}: needs the Python package {error.name}{install}") from None
    except UserError:
        raise
    except (MlflowException, SQLAlchemyError, OSError, sqlite3.Error, ValueError) as error:  # [::1 is a ValueError
        kind = TrackingUnavailable if is_unavailable(error) and remedy(error) is None else UserError
        raise kind(f"tracking.uri={shown_uri(uri)}: {_reason(uri, error)}") from None


@cache
def connect(uri: str) -> "MlflowClient":
    """MLflow's client for a server or database, kept quiet and impatient; what the user has set stays."""
    patience.follow_certificates()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # They tell of set-up at INFO, of a locked database with a traceback, and of each retry. What matters
    # comes as an exception too.
    for logger in ("mlflow.store", "mlflow.system_metrics", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return MlflowClient(uri)


@contextmanager
def reachable(uri: str, *, upload: bool = False) -> Iterator[None]:
    """Raise TrackingUnavailable if MLflow does not answer: before the block within 16 s, or when a call in it fails so.

    Raises UserError if a call is refused, by MLflow or the store of its files. With `upload` MLflow may take 120 s for
    an answer inside the block: a server that stores a large file answers when it has done so.
    """
    try:
        _ask(uri)
        with _time_for_uploads() if upload else nullcontext():
            yield
    except Exception as error:
        # First: an untrusted certificate and a database's denial are of the same kind as that nobody answers.
        if not isinstance(error, UserError) and (text := remedy(error)):
            raise UserError(f"tracking.uri={shown_uri(uri)}: {text} ({reason(error)})") from None
        if is_unavailable(error):
            raise unavailable(uri, reason(error)) from None
        raise


def unavailable(uri: str, why: str) -> TrackingUnavailable:
    """The exception for a server that does not answer."""
    return TrackingUnavailable(f"tracking.uri={shown_uri(uri)}: MLflow does not answer ({why})")


def probe(uri: str) -> None:
    """Raise within 5 s if a database cannot be written to; do nothing for an HTTP server.

    SQLAlchemy under MLflow tries a database that is not there for minutes.
    """
    from sqlalchemy.engine import make_url

    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    port = _DATABASE_PORTS.get(scheme)
    if port and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or port), timeout=_PROBE_SECONDS).close()
    if scheme == "sqlite" and (path := make_url(uri).database) and os.path.isfile(path):
        with closing(sqlite3.connect(path, timeout=_PROBE_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")


def is_unavailable(error: BaseException) -> bool:
    """Whether the error, or what it was raised from, says that nobody answers now."""
    import requests
    from sqlalchemy import exc

    if isinstance(error, UserError):
        return isinstance(error, TrackingUnavailable)
    kinds = (ConnectionError, TimeoutError, socket.gaierror, sqlite3.OperationalError)
    remote = (requests.ConnectionError, requests.Timeout, requests.exceptions.RetryError)
    broken = (requests.exceptions.ChunkedEncodingError, exc.OperationalError, exc.TimeoutError)
    return any(isinstance(cause, kinds + remote + broken) or _store_is_away(cause) for cause in causes(error))


def _store_is_away(error: BaseException) -> bool:
    """Whether boto3 says that the object store of the artifacts does not answer now."""
    if "botocore" not in sys.modules:
        return False
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
    return isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError)


def is_refusal(error: Exception) -> bool:
    """Whether MLflow itself says no, so that asking again is useless.

    A proxy's page or a token that has expired is no refusal: both are mended without a change here.
    """
    from mlflow.exceptions import MlflowException

    if is_unavailable(error):
        return False
    if not isinstance(error, MlflowException):
        return True
    return error.error_code in _REFUSALS and "Response body" not in str(error)


def is_answer(error: Exception) -> bool:
    """True if the server has answered with an error that nobody can mend, such as HTTP 500."""
    import requests

    # requests raises RetryError for answers alone, not for connections.
    answered = any(isinstance(cause, requests.exceptions.RetryError) for cause in causes(error))
    return remedy(error) is None and (answered or not is_unavailable(error))


def reason(error: BaseException) -> str:
    """The first line of an error, and of MLflow's and urllib3's onion only the core; no password is in it."""
    text = mask(first_line(error)).partition(" Response text: ")[0]
    if broken := re.search(r"""(['"])(Connection broken: .*?)\1, """, text):  # urllib3 says the rest twice
        return broken[2][:300]
    core = text.rpartition("(Caused by ")[2]
    if core == text:
        core = re.sub(r"^API request to \S+ failed with (timeout )?exception |\. To increase the timeout, .*", "", text)
        return re.sub(r"^HTTPS?ConnectionPool\(.*?\): ", "", core)[:300]
    return re.sub(r"^\w+\(.*?\): |^\w+\(.*?, '|^\w+\(['\"]|['\"]?\)+$", "", core)[:300]


def shown_uri(uri: str) -> str:
    """The URI without a password."""
    return mask(uri)


def _ask(uri: str) -> None:
    with nullcontext() if uri in _asked else _alone(uri):
        probe(uri)
        connect(uri).search_experiments(max_results=1)
    _asked.add(uri)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time, where MLflow is a SQLite file: it makes the tables of a new one in steps that collide.

    MLflow's own lock covers some of the steps. This one is on the file's folder, so that nothing is left behind; a file
    system without such locks does without.
    """
    with ExitStack() as held:
        with suppress(OSError):
            if uri.startswith("sqlite:////"):
                folder = os.path.dirname(uri.removeprefix("sqlite:///"))
                os.makedirs(folder, exist_ok=True)  # as MLflow does
                descriptor = os.open(folder, os.O_RDONLY)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def _time_for_uploads() -> Iterator[None]:
    # MLflow reads the variable at each request. Others that run meanwhile get more time too, which is harmless.
    ours = os.environ.get(_TIMEOUT) == _SHORT
    os.environ.update({_TIMEOUT: "120"} if ours else {})
    try:
        yield
    finally:
        os.environ.update({_TIMEOUT: _SHORT} if ours else {})


def _reason(uri: str, error: Exception) -> str:
    text = str(error)
    if "maintenance mode" in text:
        return "MLflow keeps runs in a database or on a server; use sqlite:////PATH/mlflow.db or http://HOST:PORT"
    if "unsupported URI" in text:
        return "not an address MLflow knows; use http://HOST:PORT, sqlite:////PATH/mlflow.db or another database"
    if uri.startswith("http") and "Invalid Host header" in text:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return f"MLflow there takes no requests under the name {host}; start it with --allowed-hosts '{host}'"
    if uri.startswith("http") and ("error code 401" in text or "error code 403" in text):
        return "the server refuses access; set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if found := remedy(error):
        return f"{found} ({reason(error)})"
    if uri.startswith("http") and ("error code" in text or "response body" in text):
        return f"something answers, but not an MLflow server with this path: {reason(error)}"
    if uri.startswith("http"):
        return f"no MLflow server answers: {reason(error)}"
    return f"the database cannot be used: {reason(error)}"
