"""A real S3 server (moto) on loopback, in this process: starts in a second, counts requests, misbehaves if asked.

Fixtures of all tests: `s3_server` is the server, `bucket` an address in a new bucket of it (s3://BUCKET/runs), with
the AWS_* variables set. It forgets everything when it is closed.
"""

import contextlib
import io
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
FULL = b"<Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its minimum.</Message></Error>"
"""MinIO's words where its disks are full."""
REGION = "eu-west-1"
KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "tested"}


@dataclass
class Faults:
    """What the server does wrong with a request whose method and path the filter accepts."""

    matches: Callable[[str, str], bool] = lambda method, path: True
    delay: float = 0.0
    """Seconds before each answer."""
    hang: bool = False
    """Accept and never answer."""
    refuse: int | None = None
    """503 to so many requests from now on; -1: to all."""
    full: bool = False
    """507 to whoever writes."""
    wrong_ranges: bool = False
    """Answer a request for a part of an object with its beginning."""
    ignore_conditions: bool = False
    """As an older Ceph: If-Match and If-None-Match count for nothing."""


@dataclass
class Server:
    """The server; `faults` may be replaced at any time."""

    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path with query of each, in order."""
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """First and last byte of each part of an object that was asked for."""
    url: str = ""

    def __enter__(self) -> "Server":
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._closed = threading.Event()
        self._numbers = itertools.count()
        self._one = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="s3", daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def variables(self) -> dict[str, str]:
        """What the environment of a process must have that uses the server."""
        return KEYS | {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @contextlib.contextmanager
    def bucket(self, patch: pytest.MonkeyPatch) -> Iterator[str]:
        """A new bucket, with the variables set; yields an address in it."""
        for name, value in self.variables().items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        name = f"bucket-{next(self._numbers)}"
        self.client().create_bucket(
            Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION}
        )
        self.faults = Faults()
        try:
            yield f"s3://{name}/runs"
        finally:
            self.faults = Faults()

    def client(self) -> Any:
        """boto3's client for the server."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )

    def keys(self, place: str) -> list[str]:
        """The keys below an address, relative to it; without the empty ones that stand for folders."""
        bucket, _, prefix = place.removeprefix("s3://").partition("/")
        pages = (
            self.client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=bucket, Prefix=prefix and f"{prefix}/")
        )
        found = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return [key.removeprefix(f"{prefix}/") for key in found if not key.endswith("/")]

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[tuple[str, str]]]:
        """The requests of the block."""
        del self.requests[:]
        yield self.requests

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, path, faults = environ["REQUEST_METHOD"], environ["PATH_INFO"], self.faults
        query = environ.get("QUERY_STRING", "")
        self.requests.append((method, path + (f"?{query}" if query else "")))
        if faults.matches(method, path):
            if faults.hang:
                self._closed.wait(300)
            self._closed.wait(faults.delay) if faults.delay else None
            full = faults.full and method in ("PUT", "POST")
            if faults.refuse or full:
                faults.refuse = faults.refuse and faults.refuse - 1
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                status, text = (
                    ("507 Insufficient Storage", FULL) if full else ("503 Slow Down", SLOW_DOWN)
                )
                start(
                    status,
                    [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))],
                )
                return [text]
            if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", "")):
                first, last = int(asked[1]), int(asked[2])
                self.ranges.append((first, last))
                if faults.wrong_ranges:
                    environ["HTTP_RANGE"] = f"bytes=0-{last - first}"
            if faults.ignore_conditions:
                environ.pop("HTTP_IF_MATCH", None)
                environ.pop("HTTP_IF_NONE_MATCH", None)
        if length := int(environ.get("CONTENT_LENGTH") or 0):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with self._one:  # moto answers 500 if an object is replaced while it is read; S3 does not
            answer: Iterable[bytes] = self._app(environ, start)
        return answer


def dead_port() -> int:
    """A port of loopback at which nobody listens."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block may not hang; what it takes is not a measure of speed."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """The server of all tests of this process."""
    with Server() as found:
        yield found


@pytest.fixture
def bucket(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address in a new bucket, with the variables that lead to the server."""
    with s3_server.bucket(monkeypatch) as address:
        yield address
