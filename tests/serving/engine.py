"""A stand-in for the HTTP interface of an engine, and `olora-ray follow` as a process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Engine(ThreadingHTTPServer):
    """Answers as vLLM or SGLang does to the requests for adapters, slowly, and has no room for version 4.

    It answers a chat with the folder of the adapter, in two parts if it is streamed. A chat that says `break` ends
    after the first part; `fails` is the version whose answers fail.
    """

    def __init__(self, kind: str, base: Path) -> None:
        self.kind, self.base, self.fails = kind, base, ""
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
        time.sleep(0.3)  # chats are answered with the new adapter before this request is
        return 200


class Handler(BaseHTTPRequestHandler):
    server: Engine
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        own = {"id": "base", "root": str(self.server.base), "owned_by": self.server.kind}
        served = [{"id": name, "root": folder} for name, folder in self.server.served.items()]
        self.answer(200, {"data": [own, *served]})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/audio":
            self.answer(200, {"got": content.hex(), "key": self.headers["Authorization"]})
        elif self.path == "/v1/chat/completions":
            self.chat(**json.loads(content))
        else:
            code = self.server.act(self.path, json.loads(content))
            self.answer(code, {"error": "no room for it"} if code != 200 else {})

    def chat(
        self, model: str, messages: list[dict[str, str]], stream: bool = False, **_: object
    ) -> None:
        folder = self.server.served.get(model)
        if folder is None or f"/chats-{self.server.fails}-" in folder:
            self.answer(500 if folder else 404, {"error": "no"})
        elif not stream:
            message = {"role": "assistant", "content": folder, "tool_calls": []}
            self.answer(
                200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            )
        else:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part, end in ((folder[:9], None), (folder[9:], "stop")):
                choice = {"index": 0, "delta": {"content": part}, "finish_reason": end}
                self.chunk(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
                if messages[-1]["content"] == "break":
                    self.close_connection = True
                    return
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")

    def chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def answer(self, code: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def following(name: str, uri: str, folder: Path, *words: str) -> Iterator[Callable[[str], int]]:
    """The command; yields a counter of a text in what it has printed. SIGTERM must end it with exit code 0."""
    command = [sys.executable, "-m", "olora_ray", "follow", name, "--tracking-uri", uri]
    command += ["--cache", f"{folder}/cache", *words]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ)
    try:
        yield lambda text: log.read_text().count(text)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        print(log.read_text())
        process.kill()
