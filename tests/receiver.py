"""A webhook that keeps what it is sent, here on loopback; `python -m tests.receiver ADDRESS` prints it elsewhere."""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


@dataclass
class Receiver:
    """The address of the webhook, the JSON of each request, and (path, text) of each request to another address."""

    url: str
    status: int
    got: list[dict[str, Any]] = field(default_factory=list)
    pings: list[tuple[str, str]] = field(default_factory=list)

    def events(self) -> list[str]:
        return [message["event"] for message in self.got]


@contextlib.contextmanager
def receiver(
    status: int = 200,
    address: str = "127.0.0.1",
    hear: Callable[[str, str], object] = lambda path, text: None,
) -> Iterator[Receiver]:
    """Answer each POST with `status` until the end of the block; call `hear` with its path and text."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            hear(self.path, text)
            if self.path.startswith("/hook/"):
                found.got.append(json.loads(text))
            else:
                found.pings.append((self.path, text))
            self.send_response(found.status)
            self.end_headers()

        do_PUT = do_POST

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with HTTPServer((address, 0), Handler) as server:
        found = Receiver(f"http://{address}:{server.server_port}/hook/s3cr3tOfTheHook", status)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    with receiver(
        address=sys.argv[1], hear=lambda *heard: print(json.dumps(heard), flush=True)
    ) as started:
        print(started.url, flush=True)
        threading.Event().wait()
