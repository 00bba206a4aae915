"""Let an inference engine follow an alias: it answers with the version to which the alias points, within five seconds.

    olora-ray follow NAME@ALIAS --engine URL [--base FOLDER] [--key KEY]
        [--listen HOST:PORT [--challenger NAME@ALIAS [--share 0.1] [--rows FILE]]]
    olora-ray follow NAME@ALIAS --mirror PLACE

NAME@ALIAS      a registered model and its alias (chats@champion), or a version (chats@7)
--engine        a vLLM or SGLang server on this machine, http://HOST:PORT: it serves the adapter as the model NAME@ALIAS
--base          the folder of the engine's base model, if the engine does not name one that this process can read
--key           the engine's API key: env:VARIABLE or file:/PATH
--listen        answer HTTP here: /v1/ as the engine does, which also checks its API key, but for loading adapters; the
                header x-olora-version says which version answered; /health is the engine's own, and 503 until it has a
                version; /metrics is for Prometheus
--challenger    what answers a share of the requests for NAME@ALIAS; NAME@ALIAS answers if it fails before it has begun
                its answer, and while no version of it can be loaded
--share         how much of the requests, drawn at random; default: 0.1
--rows          NAME@ALIAS answers all requests, and of the share of the chats that end by themselves the challenger is
                asked afterwards; both answers are appended to this file, as rows that olora-ray evaluate reads
--mirror        a folder or bucket that gets each version as PLACE/NAME@VERSION, where Ray Serve LLM loads adapters
                (dynamic_lora_loading_path), and then the file PLACE/NAME@ALIAS with the name of that folder
--cache         a folder for the adapters, which the engine can read; default: ~/.cache/olora_ray/adapters
--tracking-uri  as for `olora-ray registry`

The command asks MLflow every two seconds and prints a line per change. It loads a version only if all its files have
their checksums and the engine has its base model; otherwise, and while MLflow is unreachable, the engine keeps the
version that it has. An engine that was restarted gets the adapter again. SIGTERM or Ctrl+C ends the command, after the
answers that --listen has begun; the engine keeps its adapter.

Exit codes: 0 ended by a signal; 2 an error that you can fix.
"""

import json
import logging
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import requests
from aiohttp import ClientError, web
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, generate_latest

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import TryAgain, UserError, as_user_error, first_line
from olora_ray.common.logs import quiet_environment
from olora_ray.common.secrets import looked_up
from olora_ray.config import command_line
from olora_ray.serving.watch import CACHE, SECONDS, Adapter, Attempts, Watch
from olora_ray.tracking import start
from olora_ray.tracking.client import reason

logger = logging.getLogger(__name__)

# Option -> another one that it needs.
NEEDS = {
    "--listen": "--engine",
    "--challenger": "--listen",
    "--share": "--challenger",
    "--rows": "--challenger",
}
OPTIONS = ["--engine", "--base", "--key", *NEEDS, "--mirror", "--cache", "--tracking-uri"]


def main(argv: list[str]) -> None:
    parsed = command_line.parse(argv or ["--help"], __doc__ or "", options=OPTIONS)
    options = parsed.options
    if len(parsed.words) != 1 or not options.keys() & {"--engine", "--mirror"}:
        raise UserError(
            "usage: olora-ray follow NAME@ALIAS --engine URL, or --mirror PLACE, or both; see --help"
        )
    for option in options:
        if option in NEEDS and NEEDS[option] not in options:
            raise UserError(f"argument {option}: needs {NEEDS[option]}; see --help")
    quiet_environment()  # before MLflow is imported
    (name,) = parsed.words
    uri = start.chosen_uri(options.get("--tracking-uri"))
    cache = Path(command_line.absolute(options.get("--cache", str(CACHE))))
    watches = [Watch(each, uri, cache) for each in (name, options.get("--challenger")) if each]
    given = list[tuple[Watch, Callable[[str, Adapter], None], Attempts]]()
    if "--engine" in options:
        engine = Engine(options["--engine"], options.get("--base"), options.get("--key"))
        given += [(watch, engine.serve, Attempts(watch.name)) for watch in watches]
    if "--mirror" in options:
        given.append((watches[0], Mirror(options["--mirror"]).write, Attempts(name)))
    stop = threading.Event()

    def follow() -> None:
        while not stop.is_set():
            for watch, give, attempts in given:
                adapter = watch.look()
                if adapter is None or attempts.resting(str(adapter)):
                    continue
                with attempts.attempt(str(adapter)):
                    give(watch.name, adapter)
            stop.wait(SECONDS)

    if "--listen" in options:
        proxy = Proxy(engine, watches, options)
        threading.Thread(target=follow).start()
        proxy.run()
        stop.set()
    else:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        follow()
    logger.info(f"{name}: not followed any more; the engine keeps its adapter")


class Engine:
    """The HTTP interface of a vLLM or SGLang server."""

    def __init__(self, url: str, base: str | None, key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._base = base
        self._headers = {}
        if key:
            self._headers["Authorization"] = f"Bearer {looked_up(key, '--key')}"
        self.served: dict[str, str] = {}
        """The NAME@NUMBER that answers as each model."""
        self.replacing = ""
        """The model whose adapter is being replaced."""
        self.answered = time.time()
        """The time of the engine's last answer."""

    def serve(self, name: str, adapter: Adapter) -> None:
        """Let the engine answer as the model `name` with this adapter; do nothing if it already does.

        Raises UserError for a refusal, TryAgain if the engine is unreachable.
        """
        with as_user_error(f"{self.url} is not vLLM or SGLang", LookupError, ValueError):
            own, *others = self.ask("/v1/models").json()["data"]
        before = next((each["root"] for each in others if each["id"] == name), None)
        folder = str(adapter.folder)
        if before == folder:
            self.served[name] = adapter.name
            return
        self.replacing = name  # the engine answers with the new one before it says so
        try:
            adapter.check_base(self._base or own["root"])
            # SGLang replaces no adapter, and lets running requests end before it unloads one.
            if own.get("owned_by") == "sglang":
                load = partial(self.ask, "/load_lora_adapter", lora_name=name)
                if before:
                    self.ask("/unload_lora_adapter", lora_name=name)
                try:
                    load(lora_path=folder)
                except UserError:
                    with suppress(UserError):
                        if before:
                            load(lora_path=before)
                    raise
            else:
                self.ask(
                    "/v1/load_lora_adapter",
                    lora_name=name,
                    lora_path=folder,
                    load_inplace=before is not None,
                )
            logger.info(f"{name}: {adapter} answers at {self.url}")
            self.served[name] = adapter.name
        finally:
            self.replacing = ""

    def ask(self, path: str, **body: Any) -> requests.Response:
        method = "POST" if body else "GET"
        url = f"{self.url}{path}"
        try:
            # Loading an adapter waits for the step that the engine computes.
            answer = requests.request(
                method, url, json=body or None, headers=self._headers, timeout=120
            )
        except requests.RequestException as error:
            raise TryAgain(f"the engine {self.url} does not answer ({reason(error)})") from None
        self.answered = time.time()
        code = answer.status_code
        if code < 400:
            return answer
        text = f"the engine {self.url} refuses {path}: {code} {' '.join(answer.text[:500].split())}"
        if code == 404:
            text += "; start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        if code in (502, 503, 504):
            raise TryAgain(text)
        raise UserError(text)


class Mirror:
    """A folder or bucket of adapters for Ray Serve LLM, which loads a folder once, so each version has its own."""

    def __init__(self, place: str) -> None:
        self._place = command_line.absolute(place)
        self._written = ""

    def write(self, name: str, adapter: Adapter) -> None:
        folder = adapter.name
        if folder == self._written:
            return
        copy = storage.join(self._place, folder)
        # Ray Serve LLM asks for this file first.
        node_cache.upload(adapter.folder, copy, last="adapter_config.json")
        storage.write_text(storage.join(self._place, name), f"{folder}\n")
        self._written = folder
        logger.info(f"{name}: {adapter} lies in {copy}")


class Proxy:
    """Passes requests on to the engine, and a share of those for the champion to the challenger."""

    def __init__(
        self, engine: Engine, watches: Sequence[Watch], options: Mapping[str, str]
    ) -> None:
        self._engine = engine
        self._champion = watches[0]
        self._challenger = watches[-1]
        self._rows = options.get("--rows", "")
        host, _, port = options["--listen"].rpartition(":")
        with as_user_error("arguments --listen HOST:PORT and --share", OSError, ValueError):
            self._share = float(options.get("--share", "0.1"))
            self._socket = socket.create_server((host, int(port)))
        self._asking = Attempts(f"{self._challenger.name}: no row")
        # This opens a connection for each request: the engine may close a kept one just when it is used.
        self._ask = partial(
            aiohttp.request, allow_redirects=False, timeout=aiohttp.ClientTimeout(sock_connect=10)
        )
        self._requests = Counter("olora_follow_requests", "Requests", ["model", "version", "code"])
        self._version = Gauge("olora_follow_version", "Version that the engine has", ["model"])
        self._answered = Gauge(
            "olora_follow_last_answer_timestamp_seconds", "Last answer of MLflow and engine", ["of"]
        )

    def run(self) -> None:
        app = web.Application(client_max_size=0)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:health|v1/.*}", self._answer)
        # A client that leaves ends the engine's work for it.
        web.run_app(app, sock=self._socket, print=None, access_log=None, handler_cancellation=True)

    async def _metrics(self, _: web.Request) -> web.Response:
        for name, version in self._engine.served.items():
            self._version.labels(name).set(int(version.rpartition("@")[2]))
        self._answered.labels("mlflow").set(self._champion.answered)
        self._answered.labels("engine").set(self._engine.answered)
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if "lora_adapter" in request.path or "/.." in request.path:
            raise web.HTTPForbidden(text="adapters are loaded at the engine's own address")
        if request.path == "/health" and self._champion.name not in self._engine.served:
            raise web.HTTPServiceUnavailable(
                text=f"{self._champion.name}: the engine has no version of it"
            )
        content = await request.read()
        body: dict[str, Any] = {}
        with suppress(ValueError, RecursionError, TypeError):
            body = {**json.loads(content)}
        name = str(body.get("model"))
        url = f"{self._engine.url}{request.path_qs}"
        drawn = name == self._champion.name and random.random() < self._share and self._challenged()
        models = [name]
        if drawn and not self._rows:
            models.insert(0, self._challenger.name)
        response = None
        failure = ""
        for model in models:
            before = self._engine.served.get(model, "")
            told = bytearray()
            data = content
            if model != name:
                data = json.dumps({**body, "model": model}).encode()
            headers = [*_passing(request.headers), ("Accept-Encoding", "identity")]
            try:
                async with self._ask(request.method, url, data=data, headers=headers) as answer:
                    version = self._count(model, before, answer.status)
                    if answer.status >= 400 and model != name:
                        continue
                    headers = _passing(answer.headers)
                    if version:
                        headers.append(("x-olora-version", version))
                    response = web.StreamResponse(
                        status=answer.status, reason=answer.reason, headers=headers
                    )
                    await response.prepare(request)
                    async for chunk in answer.content.iter_any():
                        await response.write(chunk)
                        if drawn and self._rows:
                            told += chunk
                    await response.write_eof()
                if told and answer.ok and request.path == "/v1/chat/completions":
                    threading.Thread(
                        target=self._shadow, args=(body, bytes(told), version), daemon=True
                    ).start()
                return response
            except ClientError as error:
                failure = f"the engine {self._engine.url} does not answer: {first_line(error)}"
                self._count(model, before, 502)
                # The client must see that its answer is not whole.
                if response and request.transport:
                    request.transport.abort()
                    return response
        raise web.HTTPBadGateway(text=failure)

    def _shadow(self, body: dict[str, Any], told: bytes, champion: str) -> None:
        """Append a row with the champion's answer to a chat, and the challenger's."""
        model = self._challenger.name
        wrong = (LookupError, TypeError, ValueError)
        with (
            self._asking.attempt(),
            as_user_error("an answer is not that of an OpenAI chat", *wrong),
        ):
            text, end = _text(told)
            if end == "stop":  # neither a call of a tool nor a part of an answer
                before = self._engine.served.get(model, "")
                asked = body | {"model": model, "stream": False, "stream_options": None}
                answer = self._engine.ask("/v1/chat/completions", **asked)
                version = self._count(model, before, answer.status_code)
                other, end = _text(answer.content)
                both = {
                    "champion": champion,
                    "challenger": version,
                    "answer": other,
                    "finish_reason": end,
                }
                chat = [*body["messages"], {"role": "assistant", "content": text}]
                row = json.dumps({"messages": chat, "tools": body.get("tools"), "olora_ray": both})
                # One write for a line: others append, too.
                with open(self._rows, "ab", buffering=0) as file:
                    file.write(f"{row}\n".encode())

    def _challenged(self) -> bool:
        ours = self._engine.served.get(self._challenger.name, "")
        theirs = self._engine.served.get(self._champion.name, "")
        recent = time.time() - self._challenger.answered < 5 * SECONDS
        return recent and "" != ours == self._challenger.meant != theirs

    def _count(self, model: str, before: str, code: int) -> str:
        """Count an answer; return its version, or nothing if the version was replaced since `before`."""
        served = self._engine.served.get(model, "")
        version = ""
        if before == served and model != self._engine.replacing:
            version = before
        self._requests.labels(model if model in self._engine.served else "", version, code).inc()
        return version


def _passing(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    # These are about one connection, or about the form in which it carries the content.
    own = "host connection keep-alive transfer-encoding content-length content-encoding accept-encoding expect upgrade"
    return [(name, value) for name, value in headers.items() if name.lower() not in own.split()]


def _text(told: bytes) -> tuple[str, str]:
    # The text of a chat's first answer, whole or streamed, and why it ended.
    parts = [line[5:] for line in told.splitlines() if line.startswith(b"data: {")] or [told]
    choices = []
    for part in parts:
        choices += [each for each in json.loads(part)["choices"] if each["index"] == 0]
    texts = [(each.get("message") or each["delta"]).get("content") or "" for each in choices]
    ends = [each["finish_reason"] for each in choices if each.get("finish_reason")]
    return "".join(texts), ends[-1]
