"""Requests to s3:// that pyarrow does not offer: conditional writes, the end of cut uploads, a check with advice.

boto3 is an extra of this project; MLflow needs it too for artifacts on s3://.
"""

import contextlib
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from olora_ray.common import patience
from olora_ray.common.errors import StoreError, StoreUnavailable, TryAgain, UserError, first_line
from olora_ray.common.patience import ANSWER_SECONDS, CONNECT_SECONDS, TRUST, UNTRUSTED

logger = logging.getLogger(__name__)

SLOW_SECONDS = 5.0
"""A check that takes longer is worth a line."""
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403")
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_MISSING = ("NoSuchKey", "404")
_FULL = 507
"""Insufficient Storage, as MinIO answers where its disks are full: that does not pass by itself."""


def is_s3(place: str) -> bool:
    """True if a place lies in an S3 store."""
    return place.startswith("s3://")


def require_boto3(place: str, field: str) -> None:
    """Raise UserError that says what to install if boto3 is missing; `field` is the setting that names the place."""
    try:
        import boto3  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            f"{field}: {place} needs the Python package boto3, here and on all nodes: pip install 'olora-ray[s3]', or"
            " pip install boto3"
        ) from None


def check(place: str, field: str) -> None:
    """Write, read and delete a small object below `place`, within seconds.

    Raises UserError that starts with `field` and says what to mend, and TryAgain for what may pass by itself. A
    store that is slow is worth a line.
    """
    require_boto3(place, field)
    bucket, key = split(f"{place.rstrip('/')}/.probe-{uuid.uuid4().hex}")
    began = time.monotonic()
    try:
        with _told():
            client = _client(attempts=1)
            client.put_object(Bucket=bucket, Key=key, Body=b"probe")
            client.get_object(Bucket=bucket, Key=key)["Body"].read()
            client.delete_object(Bucket=bucket, Key=key)
    except StoreUnavailable as error:
        raise TryAgain(f"{field}: {place}: the store at {_where()} does not answer: {error}") from None
    except StoreError as error:
        raise UserError(f"{field}: {place} cannot be written: {error}") from None
    if (seconds := time.monotonic() - began) > SLOW_SECONDS:
        logger.warning(f"{field}: {place} is slow: writing, reading and deleting five bytes took {seconds:.0f} s")


def get(place: str) -> tuple[bytes, str] | None:
    """Content and etag of an object; None if there is none. Raises StoreError."""
    bucket, key = split(place)
    try:
        with _told():
            found = _client().get_object(Bucket=bucket, Key=key)
            return found["Body"].read(), str(found["ETag"])
    except FileNotFoundError:
        return None


def put_if(place: str, content: bytes, etag: str | None) -> str | None:
    """Write an object if it still has this etag, or if there is none (None); returns its new etag.

    Returns None if somebody else has written meanwhile. A store may ignore the condition, as an older Ceph does. Raises
    StoreError.
    """
    bucket, key = split(place)
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
    try:
        with _told():
            return str(_client().put_object(Bucket=bucket, Key=key, Body=content, **condition)["ETag"])
    except (FileExistsError, FileNotFoundError):  # 404: it was deleted meanwhile
        return None


def abort_uploads(place: str) -> None:
    """End the uploads in parts below `place` that were never completed, which are paid for; raises StoreError."""
    bucket, key = split(place)
    with _told():
        client = _client()
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=f"{key}/"):
            for upload in page.get("Uploads", []):
                client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def split(place: str) -> tuple[str, str]:
    """Bucket and key of an address."""
    bucket, _, key = place.removeprefix("s3://").partition("/")
    return bucket, key


def _client(attempts: int = 2) -> Any:
    patience.follow_certificates()
    names = sorted(pair for pair in os.environ.items() if pair[0].startswith("AWS_"))
    return _made(attempts, tuple(names))


@lru_cache(maxsize=8)
def _made(attempts: int, environment: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore.config import Config

    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where it has found the credentials
    # Stores other than AWS rarely have a host name for each bucket; pyarrow uses paths there too.
    style = "path" if patience.s3_endpoint() else "auto"
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
def _told() -> Iterator[None]:
    """Raise what boto3 raises as an OSError with one line."""
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _error_of(error) from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound) as error:
        raise StoreError(
            f"{first_line(error)}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give the machine"
            " a role"
        ) from None
    except (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError, OSError) as error:
        if UNTRUSTED.search(str(error)):
            raise StoreError(f"{_where()}: {TRUST}") from None
        why = re.sub(r"( on)?( endpoint| the endpoint)? URL: \S+$", "", first_line(error))  # it names the probe
        raise StoreUnavailable(f"{why}; is AWS_ENDPOINT_URL right?") from None
    except exceptions.BotoCoreError as error:
        raise StoreError(first_line(error)) from None
    except ValueError as error:  # what is no address or no name of a bucket
        raise StoreError(first_line(error)) from None


def _error_of(error: Any) -> OSError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return StoreError(f"there is no bucket of this name at {_where()}; make it, or correct the name")
    if code in _MISSING:
        return FileNotFoundError(first_line(error))
    if code in _TAKEN:
        return FileExistsError(first_line(error))
    if code in _REFUSED:
        return StoreError(
            f"{_where()} refuses access ({code}); check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE or the"
            " machine's role), which must be allowed to list, read, write and delete there"
        )
    if status == _FULL:
        return StoreError(f"{code} (HTTP {status}); make room in the store, and run the same command again")
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling"):
        return StoreUnavailable(f"{code} (HTTP {status})")
    return StoreError(first_line(error))


def _where() -> str:
    return patience.s3_endpoint() or "AWS"
