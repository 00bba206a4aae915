"""Retries of requests to an object store that has answered before, with a log line for each failure.

A store that has never answered in this process gets no retry: there the address or the credentials are probably wrong.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pyarrow import ArrowException, fs

from olora_ray.common.errors import StoreError, StoreUnavailable, first_line
from olora_ray.common.secrets import mask

logger = logging.getLogger(__name__)

# Connections to file systems: one per address and environment, kept by the process.


CONNECT_SECONDS = 5
ANSWER_SECONDS = 10
ATTEMPTS = 3
"""A store that accepts a connection and never answers fails after about ATTEMPTS * ANSWER_SECONDS."""


def connect(scheme: str, bucket: str, query: str = "") -> tuple[fs.FileSystem, str]:
    """Return the file system of SCHEME://BUCKET?QUERY, which is cached, and the path of the bucket in it.

    Raises OSError or ValueError if the address is invalid, or if AWS has no bucket of that name.
    """
    # The environment is a part of the cache's key because it may change within a process, for example in tests.
    names = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST")
    environment = tuple(sorted(pair for pair in os.environ.items() if pair[0].startswith(names)))
    return _connected(scheme, bucket, query, environment)


@lru_cache(maxsize=32)
def _connected(
    scheme: str, bucket: str, query: str, environment: tuple[tuple[str, str], ...]
) -> tuple[fs.FileSystem, str]:
    if scheme == "s3" and not query and "@" not in bucket:
        return _s3(bucket), bucket
    if scheme == "gs" and "retry_limit_seconds" not in query:  # 15 minutes by default
        query = "&".join(filter(None, [query, f"retry_limit_seconds={ATTEMPTS * ANSWER_SECONDS}"]))
    address = f"{scheme}://{bucket}/"
    if query:
        address += f"?{query}"
    system, root = fs.FileSystem.from_uri(address)
    return system, str(root).rstrip("/")


def _s3(bucket: str) -> fs.FileSystem:
    options: dict[str, Any] = {
        "region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    }
    endpoint = s3_endpoint()
    if endpoint:
        if "://" not in endpoint:
            endpoint = f"https://{endpoint}"
        parts = urlsplit(endpoint)
        options["scheme"] = parts.scheme
        options["endpoint_override"] = parts.netloc + parts.path.rstrip("/")
    else:
        # pyarrow asks us-east-1. A private network may not reach it, and it does not know buckets in China and
        # GovCloud.
        try:
            options["region"] = str(fs.resolve_s3_region(bucket))
        except OSError:
            if options["region"] is None:
                raise
    return fs.S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=ANSWER_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # a small file is then one request
        background_writes=False,  # otherwise a file that is read faster than it is sent fills the memory
        **options,
    )


_UNTRUSTED = re.compile(
    r"certificate.verify.failed|curlCode: (?:35|60|77)|wrong.version.number", re.IGNORECASE
)
"""Messages of requests, boto3 and pyarrow about an untrusted TLS certificate, or about a server without TLS."""
_TRUST = (
    "its certificate is not trusted here: set SSL_CERT_FILE, on all nodes, to a file with the certificates of your CA"
    " and of the public CAs"
)


def untrusted(error: BaseException) -> str | None:
    """Return what to do about an error of an untrusted certificate; None for another error."""
    if _UNTRUSTED.search(str(error)):
        return _TRUST
    return None


def follow_certificates() -> None:
    """Make requests and boto3 use SSL_CERT_FILE, which pyarrow and the hub's client read by themselves."""
    file = os.environ.get("SSL_CERT_FILE")
    if file:
        for name in ("REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"):
            os.environ.setdefault(name, file)


def s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


Answer = TypeVar("Answer")
PATIENCE = 60.0
"""Seconds of retries after the first failure of a request."""
_PASSING = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|HTTP status 5(?!07)\d\d"  # 507: the store is full
    r"|cloud::Status\((?:UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|RESOURCE_EXHAUSTED):"  # gs://
)
_answered: set[str] = set()


def transient(error: BaseException) -> bool:
    """True if the failure passes by itself: no answer, or an answer that asks for a retry."""
    if untrusted(error):
        return False
    return (
        isinstance(error, StoreUnavailable | TimeoutError | ConnectionError)
        or _PASSING.search(str(error)) is not None
    )


def with_retries(store: str, request: Callable[[], Answer]) -> Answer:
    """Return the answer of `request`. If `store` has answered before, retry failures for PATIENCE seconds.

    Raises FileNotFoundError for a missing file, ValueError for an invalid address, and StoreError or StoreUnavailable
    for any other failure.
    """
    end = None
    pause = PATIENCE / 60
    while True:
        try:
            answer = request()
        except FileNotFoundError:
            _answered.add(store)
            raise
        except ValueError:  # an invalid address
            raise
        except (OSError, ArrowException) as error:  # pyarrow raises both kinds for gs://
            if end is None:
                end = time.monotonic() + PATIENCE
            left = end - time.monotonic()
            if store not in _answered or not transient(error) or left <= 0:
                error_type = StoreUnavailable if transient(error) else StoreError
                problem = mask(first_line(error))
                remedy = untrusted(error)
                if remedy:
                    problem = f"{mask(store)}: {remedy}"
                raise error_type(problem) from None
            logger.warning(
                f"{mask(store)} does not answer ({first_line(error)}); retrying for {left:.0f} s more"
            )
            time.sleep(min(pause, left))
            pause *= 2
        else:
            _answered.add(store)
            return answer


# Failures of the hub of models and data sets: a refusal is final, an unreachable hub is not.


def is_temporary(error: BaseException) -> bool:
    """True if an error of huggingface_hub or datasets passes by itself: no network, no answer, or a server error.

    False on a machine that is set to stay offline (HF_HUB_OFFLINE).
    """
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.HfHubHTTPError):
            status = cause.response.status_code
            return status == 429 or status >= 500  # too many requests, or a server error
        # Any other error of the HTTP client is about the connection. huggingface_hub has changed its client (requests,
        # httpx), so the type is taken from there.
        client: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
        if isinstance(cause, client | ConnectionError | TimeoutError):
            return True
        # `datasets` hides the cause of some errors with `raise ... from None`, so follow __context__, too.
        cause = cause.__cause__ or cause.__context__
    return False
