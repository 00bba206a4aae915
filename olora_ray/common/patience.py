"""Patience with an object store that has answered before: failed requests are repeated for a while, with a line each.

A store that has never answered in this process is not waited for: what is wrong there is wrong from the start.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pyarrow import ArrowException, fs

from olora_ray.common.errors import StoreError, StoreUnavailable, first_line
from olora_ray.common.secrets import mask

logger = logging.getLogger(__name__)

# Connections to file systems: one for each address and environment, kept by the process.


CONNECT_SECONDS, ANSWER_SECONDS, ATTEMPTS = 5, 10, 3
"""A store that accepts and never answers fails after about ATTEMPTS times ANSWER_SECONDS."""


def connect(scheme: str, bucket: str, query: str = "") -> tuple[fs.FileSystem, str]:
    """The file system of SCHEME://BUCKET?QUERY and the path of the bucket in it; made once.

    Raises OSError or ValueError for what is no address, or has no bucket of that name at AWS.
    """
    # What the variables say may change, in tests for one.
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
    system, root = fs.FileSystem.from_uri(f"{scheme}://{bucket}/" + (f"?{query}" if query else ""))
    return system, str(root).rstrip("/")


def _s3(bucket: str) -> fs.FileSystem:
    options: dict[str, Any] = {"region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")}
    if endpoint := s3_endpoint():
        parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc + parts.path.rstrip("/")}
    else:
        options["region"] = _region_of(bucket, options["region"])
    return fs.S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=ANSWER_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # a small file is then one request
        background_writes=False,  # else a file that is read faster than it is sent lies in memory as a whole
        **options,
    )


def _region_of(bucket: str, named: str | None) -> str:
    """The region of a bucket at AWS; where that cannot be asked for, the one that the variables name.

    A private network may have no way to us-east-1, which knows the regions, and in China and GovCloud it knows none.
    """
    try:
        return str(fs.resolve_s3_region(bucket))
    except OSError:
        if named is None:
            raise
        return named


UNTRUSTED = re.compile(r"certificate.verify.failed|curlCode: (?:35|60|77)|wrong.version.number", re.IGNORECASE)
"""Messages of requests, boto3 and pyarrow about a TLS certificate that they do not trust, or a server without TLS."""
TRUST = (
    "its certificate is not trusted here: set SSL_CERT_FILE, on all nodes, to a file with the certificates of your CA"
    " and of the public ones"
)


def follow_certificates() -> None:
    """Let requests and boto3 read the CA file of SSL_CERT_FILE, as pyarrow and the hub's client do by themselves."""
    if file := os.environ.get("SSL_CERT_FILE"):
        for name in ("REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"):
            os.environ.setdefault(name, file)


def s3_endpoint() -> str | None:
    """The address of the S3 store, if it is not AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


Found = TypeVar("Found")
PATIENCE = 60.0
"""Seconds after the first failure in which a request is repeated."""
_PASSING = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|HTTP status 5(?!07)\d\d"  # 507: the store is full
    r"|cloud::Status\((?:UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|RESOURCE_EXHAUSTED):"  # gs://
)
_answered: set[str] = set()


def passes(error: BaseException) -> bool:
    """True if the failure passes by itself: no answer, or one that asks to come again."""
    if UNTRUSTED.search(str(error)):
        return False
    return (
        isinstance(error, StoreUnavailable | TimeoutError | ConnectionError) or _PASSING.search(str(error)) is not None
    )


def patiently(store: str, request: Callable[[], Found]) -> Found:
    """Return what `request` returns; repeat it for PATIENCE seconds if the store, which has answered before, fails.

    Raises FileNotFoundError where nothing is there, ValueError for what is no address, and StoreError or
    StoreUnavailable for all else: not all that pyarrow raises for gs:// is an OSError.
    """
    end, pause = None, PATIENCE / 60
    while True:
        try:
            found = request()
        except FileNotFoundError:
            _answered.add(store)
            raise
        except (OSError, ArrowException) as error:
            if isinstance(error, ValueError):  # what is no address
                raise
            end = time.monotonic() + PATIENCE if end is None else end
            left = end - time.monotonic()
            if store not in _answered or not passes(error) or left <= 0:
                kind = StoreUnavailable if passes(error) else StoreError
                untrusted = UNTRUSTED.search(str(error))
                raise kind(f"{mask(store)}: {TRUST}" if untrusted else mask(first_line(error))) from None
            logger.warning(f"{mask(store)} does not answer ({first_line(error)}); asked again for {left:.0f} s more")
            time.sleep(min(pause, left))
            pause *= 2
        else:
            _answered.add(store)
            return found


# Whether the hub of models and data sets refuses a request, or only does not answer it now.


def is_away(error: BaseException) -> bool:
    """True if an error of huggingface_hub or datasets passes by itself: no network, no answer, or a server in trouble.

    Not so where this machine is told to stay offline.
    """
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return False
    for cause in _chain(error):
        if isinstance(cause, errors.HfHubHTTPError):
            status = cause.response.status_code
            return status == 429 or status >= 500  # too many requests, or a server in trouble
        # All of the client's own errors but those about an answer are about the way to it. Which client it is changes.
        client: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
        if isinstance(cause, client | ConnectionError | TimeoutError):
            return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those before it, also where `datasets` hides them by raising `from None`."""
    before: BaseException | None = error
    while before is not None:
        yield before
        before = before.__cause__ or before.__context__
