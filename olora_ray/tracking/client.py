"""MLflow's clients, one per server or database, and the test whether MLflow answers.

By default MLflow retries an HTTP server for minutes (7 retries of up to 120 s), and waits 20 s per statement for a
locked SQLite database. Here a server gets two tries of 8 s, and a probe asks a database first.
"""

import fcntl
import logging
import os
import re
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from olora_ray.common import retry
from olora_ray.common.errors import TryAgain, UserError, first_line
from olora_ray.common.retry import untrusted
from olora_ray.common.secrets import mask

if TYPE_CHECKING:
    from mlflow import MlflowClient

Answer = TypeVar("Answer")

# Errors of MLflow, its database and its artifact store that a person must fix, and the remedy for each.

_STATUS = (401, 403)
# Texts of PostgreSQL, MySQL, SQL Server and SQLite. Their error type is the same as for an unreachable database.
_OF_DATABASES = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|permission denied"
    r"|(database|role) \S+ does not exist|access denied for user|is not allowed to connect|unknown database"
    r"|login failed for user|attempt to write a readonly database",
    re.IGNORECASE,
)
# Texts of SQLite, PostgreSQL and the operating system, direct or inside a server's answer.
_FULL = re.compile(
    r"database or disk is full|No space left on device|disk quota exceeded", re.IGNORECASE
)


def remedy(error: BaseException) -> str | None:
    """Return the cause of an error and what to do; None for an error that may pass or is unknown."""
    for cause in causes(error):
        trust = untrusted(cause)
        if trust:
            return trust
        # An error with an errno is about the disk of this machine, not about MLflow's.
        if _FULL.search(str(cause)) and getattr(cause, "errno", None) is None:
            return "the disk there is full; make room, and run the same command again"
        if _status(cause) == 413:
            return (
                "the server, or a proxy before it, refuses a file of this size (HTTP 413); raise its limit to the size"
                " of the largest model file (nginx: client_max_body_size), and run the same command again"
            )
        if _is_denial(cause):
            return "access is refused; correct the credentials or their permissions, and run the same command again"
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        # MLflow raises its own error inside `except`, without `from`.
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _status(error: BaseException) -> int | None:
    import requests

    if not isinstance(error, requests.HTTPError):
        return None
    status = getattr(error.response, "status_code", None)
    return status if isinstance(status, int) else None


def _is_denial(error: BaseException) -> bool:
    from mlflow.exceptions import MlflowException
    from sqlalchemy import exc

    if isinstance(error, MlflowException):
        return error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
    if isinstance(error, exc.OperationalError | exc.ProgrammingError | sqlite3.OperationalError):
        # Only the database's own text: SQLAlchemy's contains the statement and its values, too.
        return _OF_DATABASES.search(str(getattr(error, "orig", error))) is not None
    if "botocore" in sys.modules:  # boto3 is optional
        from botocore import exceptions

        if isinstance(error, exceptions.ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = error.response.get("Error", {}).get("Code")
            # These codes have another HTTP status.
            return status in _STATUS or code in ("ExpiredToken", "InvalidToken")
        if isinstance(error, exceptions.NoCredentialsError):
            return True
    return _status(error) in _STATUS


_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_PROBE_SECONDS = 5.0
_asked: set[str] = set()
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_SHORT = "8"
_SETTINGS = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # One retry, because the server may have closed a kept connection meanwhile.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    _TIMEOUT: _SHORT,
}
_REFUSALS = (
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "BAD_REQUEST",
)


class TrackingUnavailable(TryAgain):
    """MLflow does not answer now; the same call may work later."""


def check_uri(uri: str) -> None:
    """Raise UserError within seconds if no MLflow server or database answers at `uri`.

    Raises its subclass TrackingUnavailable if MLflow may answer later.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        _ask(uri)
    except ModuleNotFoundError as error:
        problem = f"tracking.uri={shown_uri(uri)}: needs the Python package {error.name}"
        if urlsplit(uri).scheme == "postgresql":
            problem += ": pip install 'olora-ray[postgresql]'"
        raise UserError(problem) from None
    # ValueError: an address such as [::1
    except (MlflowException, SQLAlchemyError, OSError, sqlite3.Error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        error_type = (
            TrackingUnavailable if is_unavailable(error) and remedy(error) is None else UserError
        )
        raise error_type(f"tracking.uri={shown_uri(uri)}: {_reason(uri, error)}") from None


@cache
def connect(uri: str) -> "MlflowClient":
    """Return MLflow's client for a server or database, with short timeouts; settings of the user stay."""
    retry.follow_certificates()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # They log set-up at INFO, a locked database with a traceback, and every retry. Everything that matters is raised as
    # an exception, too.
    for logger in ("mlflow.store", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    for logger in ("mlflow.store.db.utils", "mlflow.system_metrics"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return MlflowClient(uri)


@contextmanager
def reachable(uri: str, *, upload: bool = False) -> Iterator[None]:
    """Raise TrackingUnavailable if MLflow does not answer: within 16 s before the block, or from a call in it.

    Raises UserError if MLflow or its artifact store refuses a call. With `upload` an answer may take 120 s inside the
    block, because a server answers only when it has stored a large file.
    """
    try:
        _ask(uri)
        # MLflow reads the environment variable at each request. Other requests get more time, too, which is harmless.
        longer = upload and os.environ.get(_TIMEOUT) == _SHORT
        if longer:
            os.environ[_TIMEOUT] = "120"
        try:
            yield
        finally:
            if longer:
                os.environ[_TIMEOUT] = _SHORT
    except Exception as error:
        # Before is_unavailable: an untrusted certificate and a database's denial have the error types of an unreachable
        # server.
        text = None if isinstance(error, UserError) else remedy(error)
        if text:
            raise UserError(f"tracking.uri={shown_uri(uri)}: {text} ({reason(error)})") from None
        if is_unavailable(error):
            raise unavailable(uri, reason(error)) from None
        raise


def unavailable(uri: str, why: str) -> TrackingUnavailable:
    return TrackingUnavailable(f"tracking.uri={shown_uri(uri)}: MLflow does not answer ({why})")


def probe(uri: str) -> None:
    """Raise within 5 s if a database cannot be written; do nothing for an HTTP server."""
    # SQLAlchemy, under MLflow, retries an unreachable database for minutes.
    from sqlalchemy.engine import make_url

    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    port = _DATABASE_PORTS.get(scheme)
    if port and parts.hostname:
        address = (parts.hostname, parts.port or port)
        socket.create_connection(address, timeout=_PROBE_SECONDS).close()
    path = make_url(uri).database if scheme == "sqlite" else None
    if path and os.path.isfile(path):
        opened = sqlite3.connect(path, timeout=_PROBE_SECONDS, isolation_level=None)
        with closing(opened) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")


def existing(ask: Callable[..., Answer], *arguments: Any) -> Answer | None:
    """Return the answer of MLflow; None if it has no such run, version or model."""
    from mlflow.exceptions import MlflowException

    try:
        return ask(*arguments)
    except MlflowException as error:
        if is_unavailable(error) or error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


@contextmanager
def refused(subject: str) -> Iterator[None]:
    """Raise an error of MLflow or of its files as the UserError `subject: reason`, unless it does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        if is_unavailable(error):
            raise
        raise UserError(f"{subject}: {reason(error)}") from None


def is_unavailable(error: BaseException) -> bool:
    """True if the error, or a cause of it, says that MLflow or a store does not answer now."""
    import requests
    from sqlalchemy import exc

    if isinstance(error, UserError):
        return isinstance(error, TrackingUnavailable)
    local = (ConnectionError, TimeoutError, socket.gaierror, sqlite3.OperationalError)
    remote = (requests.ConnectionError, requests.Timeout, requests.exceptions.RetryError)
    broken = (requests.exceptions.ChunkedEncodingError, exc.OperationalError, exc.TimeoutError)
    return any(
        isinstance(cause, local + remote + broken) or _store_is_unreachable(cause)
        for cause in causes(error)
    )


def _store_is_unreachable(error: BaseException) -> bool:
    if "botocore" not in sys.modules:
        return False
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
    return isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError)


def is_refusal(error: Exception) -> bool:
    """True if MLflow itself refuses the call, so that a retry is useless."""
    from mlflow.exceptions import MlflowException

    if is_unavailable(error):
        return False
    if not isinstance(error, MlflowException):
        return True
    # The page of a proxy, or an expired token, is no refusal: a later retry may succeed.
    return error.error_code in _REFUSALS and "Response body" not in str(error)


def is_answer(error: Exception) -> bool:
    """True if the server answered with an error that the user cannot fix, such as HTTP 500."""
    import requests

    # requests raises RetryError only for answers, never for failed connections.
    answered = any(isinstance(cause, requests.exceptions.RetryError) for cause in causes(error))
    return remedy(error) is None and (answered or not is_unavailable(error))


def reason(error: BaseException) -> str:
    """Return an error's first line without passwords; of nested MLflow and urllib3 errors only the innermost."""
    text = mask(first_line(error)).partition(" Response text: ")[0]
    broken = re.search(r"""(['"])(Connection broken: .*?)\1, """, text)
    if broken:  # urllib3 repeats the rest
        return broken[2][:300]
    core = text.rpartition("(Caused by ")[2]
    if core == text:
        around = (
            r"^API request to \S+ failed with (timeout )?exception |\. To increase the timeout, .*"
        )
        core = re.sub(around, "", text)
        return re.sub(r"^HTTPS?ConnectionPool\(.*?\): ", "", core)[:300]
    return re.sub(r"^\w+\(.*?\): |^\w+\(.*?, '|^\w+\(['\"]|['\"]?\)+$", "", core)[:300]


def shown_uri(uri: str) -> str:
    return mask(uri)


def _ask(uri: str) -> None:
    with ExitStack() as held:
        # One process at a time opens a SQLite file, because MLflow creates its tables in steps that collide. MLflow's
        # own lock covers only some of the steps. This lock is on the file's folder, so no lock file stays behind. On a
        # file system without such locks there is no lock.
        if uri not in _asked and uri.startswith("sqlite:////"):
            with suppress(OSError):
                folder = os.path.dirname(uri.removeprefix("sqlite:///"))
                os.makedirs(folder, exist_ok=True)  # as MLflow does
                descriptor = os.open(folder, os.O_RDONLY)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        probe(uri)
        connect(uri).search_experiments(max_results=1)
    _asked.add(uri)


def _reason(uri: str, error: Exception) -> str:
    text = str(error)
    if "maintenance mode" in text:
        return "MLflow no longer keeps runs in a folder; use sqlite:////PATH/mlflow.db or http://HOST:PORT"
    if "unsupported URI" in text:
        return "MLflow cannot use this address; use http://HOST:PORT, sqlite:////PATH/mlflow.db or another database"
    if uri.startswith("http") and "Invalid Host header" in text:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return f"the MLflow server refuses the host name {host}; start it with --allowed-hosts '{host}'"
    if uri.startswith("http") and ("error code 401" in text or "error code 403" in text):
        return "the server refuses access; set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
    fix = remedy(error)
    if fix:
        return f"{fix} ({reason(error)})"
    if uri.startswith("http") and ("error code" in text or "response body" in text):
        return f"a server answers, but not an MLflow server with this path: {reason(error)}"
    if uri.startswith("http"):
        return f"no MLflow server answers: {reason(error)}"
    return f"the database cannot be used: {reason(error)}"
