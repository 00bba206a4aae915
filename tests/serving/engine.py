"""A stand-in for the HTTP interface of an engine, also as a process, and `olora-ray follow` as a process.

python -m tests.serving.engine BASE PORT [VERSION]
"""

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

VERSIONS = {"vllm": "0.32.0", "sglang": "0.5.10"}


class Engine:
    """Answers as vLLM or SGLang does to the requests for adapters, slowly, and has no room for version 4.

    It answers a chat with the folder of the adapter, in two parts if it is streamed. A chat that says `break` ends
    after the first part; `fails` is the version whose answers fail. As vLLM up to 0.30, which caches by names, it
    answers with the folder that a name had first.
    """

    def __init__(self, kind: str, base: Path, port: int = 0, version: str = "") -> None:
        self.kind = kind
        self.base = base
        self.version = version or VERSIONS[kind]
        self.fails = ""
        self.pace = 0.0
        """Seconds before each part of an answer."""
        self.drops = 0
        """So many requests on connections that were used before get no answer: the connection is closed."""
        self.connections = 0
        self.left = 0
        """Clients that went before the end of their answer."""
        self.busy = Counter[str]()
        """Folder -> chats that it answers now."""
        self.busiest = Counter[str]()
        self.served = dict[str, str]()  # name -> folder
        self.cached = dict[str, str]()
        self.port = port
        self._used = set[Any]()
        self.loop = asyncio.new_event_loop()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, or start it again: it has forgotten its adapters."""
        self.served.clear()
        self.cached.clear()
        if not self.loop.is_running():
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/version", self.told_version)
        app.router.add_get("/get_server_info", self.told_version)
        app.router.add_get("/health", lambda _: web.Response())
        app.router.add_post("/v1/audio", self.audio)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/{path:.*lora_adapter}", self.adapters)
        long = 4 * 2**20
        self._runner = web.AppRunner(
            app,
            auto_decompress=False,
            handler_cancellation=True,
            access_log=None,
            max_line_size=long,
            max_field_size=long,
            shutdown_timeout=0.1,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, backlog=2048)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self.loop).result()

    async def models(self, _: web.Request) -> web.Response:
        own = {"id": "base", "root": str(self.base), "owned_by": self.kind}
        served = [{"id": name, "root": folder} for name, folder in self.served.items()]
        return web.json_response({"data": [own, *served]})

    async def told_version(self, request: web.Request) -> web.Response:
        own = "/version" if self.kind == "vllm" else "/get_server_info"
        if request.path != own:
            raise web.HTTPNotFound
        return web.json_response({"version": self.version})

    async def audio(self, request: web.Request) -> web.Response:
        content = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        return web.json_response(
            {"got": content[:4096].hex(), "bytes": len(content), "headers": headers},
            headers={"x-long": "x" * len(headers.get("x-long", ""))},
        )

    async def adapters(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["lora_name"]
        act = request.path.removeprefix("/v1" if self.kind == "vllm" else "")
        if act == "/unload_lora_adapter":
            code = 200 if self.served.pop(name, None) else 400
        elif act != "/load_lora_adapter" or "/chats-4-" in body["lora_path"]:
            code = 500
        elif name in self.served and not body.get("load_inplace"):
            code = 400
        else:
            self.served[name] = body["lora_path"]
            await asyncio.sleep(
                0.3
            )  # chats are answered with the new adapter before this request is
            code = 200
        return web.json_response({"error": "no room for it"} if code != 200 else {}, status=code)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        if transport in self._used and self.drops:
            self.drops -= 1
            transport.abort()
            return web.Response()
        self.connections += transport not in self._used
        self._used.add(transport)
        try:
            body = json.loads(await request.read())
        except ValueError:
            raise web.HTTPBadRequest from None
        model = body["model"]
        folder = self.served.get(model)
        if folder is None or f"/chats-{self.fails}-" in folder:
            return web.json_response({"error": "no"}, status=500 if folder else 404)
        if self.kind == "vllm" and int(self.version.split(".")[1]) < 31:
            folder = self.cached.setdefault(model, folder)
        self.busy[folder] += 1
        self.busiest |= self.busy
        try:
            return await self._answer(request, body, folder)
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.busy[folder] -= 1

    async def said(self, body: dict[str, Any], folder: str) -> tuple[str, str]:
        """The answer to a chat that is not streamed, and why it ended."""
        return folder, "stop"

    async def _answer(
        self, request: web.Request, body: dict[str, Any], folder: str
    ) -> web.StreamResponse:
        await asyncio.sleep(self.pace)
        id = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        told = {"id": f"chatcmpl-{id}", "object": "chat", "model": body["model"]}
        if not body.get("stream"):
            text, end = await self.said(body, folder)
            message = {"role": "assistant", "content": text, "tool_calls": []}
            choice = {"index": 0, "message": message, "finish_reason": end}
            return web.json_response({**told, "choices": [choice]})
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        parts = body.get("max_tokens", 2)
        for i in range(parts):
            end = "stop" if i == parts - 1 else None
            text = folder[9 * i : 9 * i + 9] if end is None else folder[9 * i :]
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": end}
            line = f"data: {json.dumps({**told, 'choices': [choice]})}\n\n".encode()
            await answer.write(line[:20])  # as a network may cut it
            await answer.write(line[20:])
            await asyncio.sleep(self.pace)
            if body["messages"][-1]["content"] == "break":
                request.transport.abort()
                return answer
        await answer.write(b"data: [DONE]\n\n")
        return answer


@dataclass
class Printed:
    pid: int
    log: Path

    def __call__(self, text: str) -> int:
        return self.log.read_text().count(text)

    @property
    def memory(self) -> int:
        """The most bytes that the process has held so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


@contextlib.contextmanager
def following(name: str, uri: str, folder: Path, *words: str) -> Iterator["Printed"]:
    """The command; yields a counter of a text in what it has printed. SIGTERM must end it with exit code 0."""
    command = [sys.executable, "-m", "olora_ray", "follow", name, "--tracking-uri", uri]
    command += ["--cache", f"{folder}/cache", *words]
    # The usual soft limit of open files.
    command = ["sh", "-c", 'ulimit -S -n 1024; exec "$@"', "sh", *command]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ)
    try:
        yield Printed(process.pid, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        print(log.read_text())
        process.kill()


def main(base: str, port: str, version: str = "") -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # as vLLM does
    engine = Engine("vllm", Path(base), int(port), version)
    engine.pace = float(os.environ.get("ENGINE_PACE", "0"))
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main(*sys.argv[1:])
