"""The proxy signs in for whoever asks it, and hands everything else on."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from requests.auth import _basic_auth_str

from tests.demos.proxy import signed_in


class Guarded(BaseHTTPRequestHandler):
    """Answers with what it was asked, if the password is right."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        right = self.headers["Authorization"] == _basic_auth_str("nightly", "right")
        content = f"{self.command} {self.path} ".encode() + body
        self.send_response(200 if right else 401)
        self.send_header("Content-Type", "text/x-asked")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_it_has_the_password_and_its_caller_needs_none(server: str) -> None:
    assert requests.get(f"{server}/page", timeout=10).status_code == 401
    with signed_in(server, "nightly", "right") as address:
        got = requests.post(f"{address}/page?name=a%20b", data=b"question", timeout=10)
        assert (got.status_code, got.text) == (200, "POST /page?name=a%20b question")
        assert got.headers["Content-Type"] == "text/x-asked"
    with pytest.raises(requests.ConnectionError):
        requests.get(address, timeout=10)


def test_a_wrong_password_is_refused_through_it_too(server: str) -> None:
    with signed_in(server, "nightly", "wrong") as address:
        assert requests.get(f"{address}/page", timeout=10).status_code == 401
