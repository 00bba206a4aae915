"""A small Google Cloud Storage on loopback, in this process: objects in a dictionary, listed as the real one does it.

It knows what pyarrow asks of it: uploads that can be resumed, reads, deletions, and listings whose folders are no
objects but `prefixes`, which pyarrow does not read.
"""

import contextlib
import datetime
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest
from pyarrow import fs

from olora_ray.common import retry

BUCKET = "bucket"
MADE = "2026-11-27T07:00:00.000Z"


class GsServer(ThreadingHTTPServer):
    """The server."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.objects: dict[str, bytes] = {}
        """Content by key."""
        self.uploads: dict[str, bytes] = {}
        """What has arrived of those that have not ended."""

    def filesystem(self, seconds: int) -> fs.GcsFileSystem:
        """pyarrow's connection, which asks for so long; of no seconds the end comes before the first request."""
        limit = datetime.timedelta(seconds=seconds)
        address = f"127.0.0.1:{self.server_port}"
        return fs.GcsFileSystem(
            anonymous=True, scheme="http", endpoint_override=address, retry_time_limit=limit
        )


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GsServer

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        path, query, _ = self._asked()
        bucket = f"/storage/v1/b/{BUCKET}/o"
        if path == bucket:
            self._list(query.get("prefix", ""), query.get("delimiter"))
            return
        key = unquote(path.removeprefix(f"{bucket}/" if path.startswith(bucket) else f"/{BUCKET}/"))
        if key not in self.server.objects:
            self._missing()
        elif query.get("alt") == "media" or not path.startswith(bucket):
            self._send(200, self.server.objects[key])
        else:
            self._send(200, self._about(key))

    def do_POST(self) -> None:
        _, query, body = self._asked()
        key = query.get("name") or json.loads(body)["name"]
        place = f"http://{self.headers['Host']}/upload/{quote(key, safe='')}"
        self._send(200, b"", Location=place)

    def do_PUT(self) -> None:
        path, _, body = self._asked()
        key = unquote(path.removeprefix("/upload/"))
        whole = self.server.uploads.get(key, b"") + body
        if self.headers.get("Content-Range", "").endswith("/*"):  # more will come
            self.server.uploads[key] = whole
            self._send(308, b"", Range=f"bytes=0-{len(whole) - 1}")
            return
        self.server.uploads.pop(key, None)
        self.server.objects[key] = whole
        self._send(200, self._about(key))

    def do_DELETE(self) -> None:
        path, _, _ = self._asked()
        if self.server.objects.pop(unquote(path.partition("/o/")[2]), None) is None:
            self._missing()
        else:
            self._send(204, b"")

    def _list(self, prefix: str, delimiter: str | None) -> None:
        items, folders = [], set()
        for key in sorted(key for key in self.server.objects if key.startswith(prefix)):
            inner = key[len(prefix) :]
            if delimiter and delimiter in inner:
                folders.add(prefix + inner.partition(delimiter)[0] + delimiter)
            else:
                items.append(self._about(key))
        self._send(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def _about(self, key: str) -> dict[str, str]:
        size = str(len(self.server.objects[key]))
        times = {"timeCreated": MADE, "updated": MADE}
        return {
            "kind": "storage#object",
            "name": key,
            "bucket": BUCKET,
            "size": size,
            "generation": "1",
            **times,
        }

    def _missing(self) -> None:
        self._send(404, {"error": {"code": 404, "message": "No such object"}})

    def _asked(self) -> tuple[str, dict[str, str], bytes]:
        split = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return split.path, dict(parse_qsl(split.query)), body

    def _send(self, code: int, content: bytes | dict[str, Any], **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def gs_server(patch: pytest.MonkeyPatch, seconds: int = 5) -> Iterator[GsServer]:
    """The server, to which all gs:// addresses lead meanwhile."""
    server = GsServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), name="gs", daemon=True).start()
    system = server.filesystem(seconds)
    patch.setattr(retry, "connect", lambda scheme, bucket, query="": (system, bucket))
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
