"""A way into a server with passwords for a browser that knows none: a proxy that says who is asking."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

_OF_THE_HOP = {"connection", "content-encoding", "content-length", "date", "server", "transfer-encoding"}
"""Headers of one connection, not of what it carries; `requests` has unpacked the content."""


@contextlib.contextmanager
def signed_in(server: str, user: str, password: str) -> Iterator[str]:
    """An address on loopback that shows `server` as the user sees it, as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            # The server refuses requests that a page from elsewhere makes, and to it this page is from elsewhere.
            headers = {name: self.headers[name] for name in ("Accept", "Content-Type") if name in self.headers}
            got = requests.request(
                self.command,
                f"{server}{self.path}",
                headers=headers,
                data=body,
                auth=(user, password),
                timeout=60,
                allow_redirects=False,
            )
            self.send_response(got.status_code)
            for name, value in got.headers.items():
                if name.lower() not in _OF_THE_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(got.content)))
            self.end_headers()
            self.wfile.write(got.content)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{proxy.server_port}"
        finally:
            proxy.shutdown()
