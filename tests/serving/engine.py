"""A stand-in for the HTTP interface of an engine, and `olora-ray follow` as a process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Engine(ThreadingHTTPServer):
    """Answers as vLLM or SGLang does to the requests for adapters, and has no room for version 4."""

    def __init__(self, kind: str, base: Path) -> None:
        self.kind, self.base = kind, base
        self.served = dict[str, str]()  # name -> folder
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def act(self, path: str, body: dict[str, str]) -> int:
        name = body["lora_name"]
        v1 = "/v1" * (self.kind == "vllm")
        if path == f"{v1}/unload_lora_adapter":
            return 200 if self.served.pop(name, None) else 400
        if path != f"{v1}/load_lora_adapter" or "/chats-4-" in body["lora_path"]:
            return 500
        if name in self.served and not body.get("load_inplace"):
            return 400
        self.served[name] = body["lora_path"]
        return 200


class Handler(BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        own = {"id": "base", "root": str(self.server.base), "owned_by": self.server.kind}
        served = [{"id": name, "root": folder} for name, folder in self.server.served.items()]
        self.answer(200, {"data": [own, *served]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        code = self.server.act(self.path, body)
        self.answer(code, {"error": "no room for it"} if code != 200 else {})

    def answer(self, code: int, body: object) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def following(name: str, uri: str, folder: Path, *words: str) -> Iterator[Callable[[str], bool]]:
    """The command; yields a test for a text in what it has printed. SIGTERM must end it with exit code 0."""
    command = [sys.executable, "-m", "olora_ray", "follow", name, "--tracking-uri", uri]
    command += ["--cache", f"{folder}/cache", *words]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ)
    try:
        yield lambda text: text in log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        print(log.read_text())
        process.kill()
