"""Connections to file systems: one for each address and environment, kept by the process.

Object stores are spoken to through pyarrow. Where an S3 store is and who may use it comes from the usual variables
(AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_PROFILE ...), so that MLflow and Ray find the same one.
"""

import os
import re
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

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
"""What requests, boto3 and pyarrow say of a TLS certificate that they do not trust, or of a server without TLS."""
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
