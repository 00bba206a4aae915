"""Requests to s3:// that pyarrow does not offer: conditional writes, and an early check.

boto3 is an optional dependency (olora-ray[s3]). MLflow also needs it for artifacts on s3://.
"""

import contextlib
import logging
import os
import re
import uuid
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from olora_ray.common import retry
from olora_ray.common.errors import StoreError, StoreUnavailable, TryAgain, UserError, first_line
from olora_ray.common.retry import ANSWER_SECONDS, CONNECT_SECONDS, untrusted

_REFUSED = (
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "403",
)
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_MISSING = ("NoSuchKey", "404")
_FULL = 507
"""HTTP status Insufficient Storage, MinIO's answer when its disks are full. A retry does not help."""


def is_s3(location: str) -> bool:
    return location.startswith("s3://")


def require_boto3(location: str, field: str) -> None:
    try:
        import boto3  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            f"{field}: {location} needs the Python package boto3, here and on all nodes: pip install"
            " 'olora-ray[s3]', or pip install boto3"
        ) from None


def check_bucket(location: str, field: str) -> None:
    """Write, read and delete a small object below `location`.

    Raises a UserError that starts with `field` and says what to do, and TryAgain for a problem that may pass by itself.
    """
    require_boto3(location, field)
    bucket, key = split(f"{location.rstrip('/')}/.probe-{uuid.uuid4().hex}")
    try:
        with _as_store_error():
            client = _client(attempts=1)
            client.put_object(Bucket=bucket, Key=key, Body=b"probe")
            client.get_object(Bucket=bucket, Key=key)["Body"].read()
            client.delete_object(Bucket=bucket, Key=key)
    except StoreUnavailable as error:
        raise TryAgain(
            f"{field}: {location}: the object store at {_where()} does not answer: {error}"
        ) from None
    except StoreError as error:
        raise UserError(f"{field}: {location} cannot be written: {error}") from None


def get(location: str) -> tuple[bytes, str] | None:
    bucket, key = split(location)
    try:
        with _as_store_error():
            answer = _client().get_object(Bucket=bucket, Key=key)
            return answer["Body"].read(), str(answer["ETag"])
    except FileNotFoundError:
        return None


def put_if(location: str, content: bytes, etag: str | None) -> str | None:
    """Write an object if its etag is still `etag`, or if it does not exist (None); return its new etag.

    Returns None if another process has written or deleted the object meanwhile. Some stores, such as an older Ceph,
    ignore the condition and write. Raises StoreError.
    """
    bucket, key = split(location)
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
    try:
        with _as_store_error():
            answer = _client().put_object(Bucket=bucket, Key=key, Body=content, **condition)
            return str(answer["ETag"])
    except (FileExistsError, FileNotFoundError):  # 404: it was deleted meanwhile
        return None


def split(location: str) -> tuple[str, str]:
    bucket, _, key = location.removeprefix("s3://").partition("/")
    return bucket, key


def _client(attempts: int = 2) -> Any:
    retry.follow_certificates()
    variables = sorted(pair for pair in os.environ.items() if pair[0].startswith("AWS_"))
    return _cached_client(attempts, tuple(variables))


@lru_cache(maxsize=8)
def _cached_client(attempts: int, environment: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore.config import Config

    # At INFO it logs where the credentials come from.
    logging.getLogger("botocore").setLevel(logging.WARNING)
    # Few stores other than AWS have a host name per bucket, so the bucket is a part of the path there, as in pyarrow.
    style = "path" if retry.s3_endpoint() else "auto"
    return boto3.session.Session().client(
        "s3",
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=ANSWER_SECONDS,
            retries={"mode": "standard", "total_max_attempts": attempts},
            s3={"addressing_style": style},
        ),
    )


@contextlib.contextmanager
def _as_store_error() -> Iterator[None]:
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _error_of(error) from None
    except (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.ProfileNotFound,
    ) as error:
        raise StoreError(
            f"{first_line(error)}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or attach a role"
            " to the machine"
        ) from None
    except (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        OSError,
    ) as error:
        remedy = untrusted(error)
        if remedy:
            raise StoreError(f"{_where()}: {remedy}") from None
        # The URL at the end names the probe, a file that the user does not know.
        why = re.sub(r"( on)?( endpoint| the endpoint)? URL: \S+$", "", first_line(error))
        raise StoreUnavailable(f"{why}; check AWS_ENDPOINT_URL") from None
    except exceptions.BotoCoreError as error:
        raise StoreError(first_line(error)) from None
    except ValueError as error:  # an invalid address or bucket name
        raise StoreError(first_line(error)) from None


def _error_of(error: Any) -> OSError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return StoreError(
            f"there is no bucket of this name at {_where()}; create it, or correct the name"
        )
    if code in _MISSING:
        return FileNotFoundError(first_line(error))
    if code in _TAKEN:
        return FileExistsError(first_line(error))
    if code in _REFUSED:
        return StoreError(
            f"{_where()} refuses access ({code}); check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE or the"
            " machine's role): they must allow listing, reading, writing and deleting there"
        )
    if status == _FULL:
        return StoreError(
            f"{code} (HTTP {status}); make room in the object store, and run the same command again"
        )
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling"):
        return StoreUnavailable(f"{code} (HTTP {status})")
    return StoreError(first_line(error))


def _where() -> str:
    return retry.s3_endpoint() or "AWS"
