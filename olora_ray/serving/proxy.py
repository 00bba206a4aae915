"""The HTTP port of `olora-ray follow`: passes requests on to the engine, and a share of them to a challenger.

The engine knows each version by a name of its own (`Adapter.engine_name`). Here the name in a request's body is
replaced by it, and in the answer by the name that was asked for. All other bytes and headers pass as they are, also a
compressed body, in which no name is found: the engine answers it as it would without this port.
"""

import asyncio
import json
import random
import re
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import ClientError, web
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, generate_latest

from olora_ray.common.errors import as_user_error, first_line
from olora_ray.serving.engine import Engine
from olora_ray.serving.keep import COLUMN, Keeper, append, chat_row, told
from olora_ray.serving.watch import SECONDS, Adapter, Attempts, Watch

# Bytes of a request's body; of all bodies above SMALL together, so that whatever is sent, the memory is limited.
LARGEST = 32 * 2**20
LARGEST_SUM = 48 * 2**20
SMALL = 2**18
# Bytes of a line of a head, as vLLM's.
HEAD = 4 * 2**20
# vLLM closes a connection that was idle for 5 s. Of two ends that close at once, the later one loses a request.
KEPT_SECONDS = 4.0
CHAT = "/v1/chat/completions"
FEEDBACK = 'expected {"id": "ID OF AN ANSWER", "rating": 1 or -1}, or "correction": "TEXT" in place of the rating'
SHADOWS = 8
"""Largest number of requests that the challenger answers at once beside the champion (--rows)."""
# These headers are about one connection.
_OF_A_CONNECTION = {
    *("connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade", "expect", "host"),
    *("content-length", "transfer-encoding"),
}

CODES = {
    204: None,
    404: "no answer with this id is known",
    503: "the feedback could not be written; the log says why",
}


class Proxy:
    def __init__(
        self,
        engine: Engine,
        watches: Sequence[Watch],
        options: Mapping[str, str],
        wake: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._watches = watches
        self._champion = watches[0]
        self._challenger = watches[-1]
        self._wake = wake
        self._rows = options.get("--rows", "")
        self._keeper = Keeper(options) if "--keep" in options else None
        # Two sockets per request: the soft limit, often 1,024, would not do.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._most = max(hard // 2 - 64, 16)
        host, _, port = options["--listen"].rpartition(":")
        with as_user_error("arguments --listen HOST:PORT and --share", OSError, ValueError):
            self._share = float(options.get("--share", "0.1"))
            self._socket = socket.create_server((host, int(port)))
        names = [re.escape(form) for watch in watches for form in _forms(watch.name)]
        self._name = re.compile(rb'"model"\s*:\s*"(%s)"' % b"|".join(names))
        self._asking = Attempts(f"{self._challenger.name}: no row")
        self._shadows: list[threading.Thread] = []
        self._requests = Counter("olora_follow_requests", "Requests", ["model", "version", "code"])
        self._left_out = Counter(
            "olora_follow_rows_left_out", "Requests without a row: the challenger was busy"
        )
        self._version = Gauge("olora_follow_version", "Version that the engine has", ["model"])
        self._recalled = Gauge(
            "olora_follow_from_cache",
            "1: the version is from the cache, as MLflow does not answer",
            ["model"],
        )
        self._answered = Gauge(
            "olora_follow_last_answer_timestamp_seconds", "Last answer of MLflow and engine", ["of"]
        )

    def run(self) -> None:
        app = web.Application(client_max_size=SMALL)
        app.cleanup_ctx.append(self._with_session)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        app.router.add_route("*", "/{path:v1/.*}", self._answer)
        if self._keeper:
            app.router.add_post("/feedback", self._feedback)
        # A client that leaves ends the engine's work for it.
        web.run_app(
            app,
            sock=self._socket,
            print=None,
            access_log=None,
            backlog=2048,
            handler_cancellation=True,
            auto_decompress=False,
            max_line_size=HEAD,
            max_field_size=HEAD,
        )
        if self._keeper:
            self._keeper.stop()

    async def _with_session(self, _: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._most, keepalive_timeout=KEPT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),  # the clients' own cookies pass
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            timeout=aiohttp.ClientTimeout(sock_connect=10),
            auto_decompress=False,
            max_line_size=HEAD,
            max_field_size=HEAD,
        ) as self._session:
            yield

    async def _metrics(self, _: web.Request) -> web.Response:
        self._version.clear()
        for name, adapter in [*self._engine.served.items()]:
            self._version.labels(name).set(int(adapter.version.number))
        for watch in self._watches:
            self._recalled.labels(watch.name).set(watch.recalled)
        self._answered.labels("mlflow").set(self._champion.answered)
        self._answered.labels("engine").set(self._engine.answered)
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _health(self, request: web.Request) -> web.StreamResponse:
        name = self._champion.name
        adapter = self._engine.served.get(name)
        if adapter is None or await self._lost(name, adapter):
            raise _busy(f"{name}: the engine has no version of it")
        return await self._answer(request)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if "lora_adapter" in request.path or "/.." in request.path:
            raise web.HTTPForbidden(text="adapters are loaded at the engine's own address")
        body = _Body()
        try:
            await body.receive(request, self._name)
            return await self._passed(request, body)
        finally:
            _Body.held -= body.large
            body.parts.clear()  # the traceback of an error answer would keep them

    async def _passed(self, request: web.Request, body: "_Body") -> web.StreamResponse:
        name = body.model
        # The second try is for a kept connection that the engine has just closed, and for a version just unloaded.
        models = [name, name]
        drawn = name == self._champion.name and random.random() < self._share and self._challenged()
        if drawn and not self._rows:
            models.insert(0, self._challenger.name)
        failure = _busy(f"{name}: the engine has no version of it")
        for model in models:
            adapter = self._engine.served.get(model)
            if model and adapter is None:
                continue
            headers = _passing(request.headers)
            if adapter:
                headers["Accept-Encoding"] = "identity"  # its names are replaced
            data, length = body.sent(adapter)
            if data is not None:
                headers["Content-Length"] = str(length)
            try:
                async with self._session.request(
                    request.method,
                    f"{self._engine.url}{request.path_qs}",
                    data=data,
                    headers=headers,
                    allow_redirects=False,
                ) as answer:
                    self._count(model, adapter, answer.status)
                    if adapter and answer.status == 404 and await self._lost(model, adapter):
                        continue
                    if answer.status >= 400 and model != name:
                        continue
                    content, response = await self._relayed(request, answer, name, adapter)
                if adapter and request.path == CHAT and answer.status == 200:
                    if self._keeper:
                        # A large question is not copied; without an answer it is left out.
                        asked = b"" if body.large else b"".join(body.parts)
                        self._keeper.answered(asked, content, adapter.name)
                    if drawn and self._rows and content:
                        self._begin_shadow(body, content, adapter)
                return response
            except ClientError as error:
                self._count(model, adapter, 502)
                reason = first_line(error)
                failure = web.HTTPBadGateway(
                    text=f"the engine {self._engine.url} does not answer: {reason}"
                )
                if isinstance(error, aiohttp.ClientConnectorError):
                    self._engine.served.clear()
                    break
        raise failure

    async def _relayed(
        self,
        request: web.Request,
        answer: aiohttp.ClientResponse,
        name: str,
        adapter: Adapter | None,
    ) -> tuple[bytes, web.StreamResponse]:
        """Pass an answer on; return its content for a row, which is empty if it was not whole, and the response."""
        response = web.StreamResponse(
            status=answer.status, reason=answer.reason, headers=_passing(answer.headers)
        )
        names = {}
        if adapter:
            response.headers["x-olora-version"] = adapter.name
            names = {adapter.engine_name: name}
        elif request.path == "/v1/models":
            names = {each.engine_name: asked for asked, each in self._engine.served.items()}
        rename = None
        if names and answer.content_type in ("application/json", "text/event-stream"):
            rename = _renaming(names)
        else:
            response.content_length = answer.content_length
        keeps = adapter and request.path == CHAT and (self._keeper or self._rows)
        kept = bytearray()
        line = b""
        try:
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                if keeps:
                    kept += chunk
                if rename:
                    # No name goes over the end of a line. A long one without an end has had its name before.
                    lines, end, line = (line + chunk).rpartition(b"\n")
                    if len(line) > SMALL:
                        end += line
                        line = b""
                    chunk = rename(lines + end)
                if chunk:
                    await response.write(chunk)
            await response.write_eof(rename(line) if rename else b"")
        except ClientError:
            # The client must see that its answer is not whole.
            if request.transport:
                request.transport.abort()
            return b"", response
        return bytes(kept), response

    async def _lost(self, name: str, adapter: Adapter) -> bool:
        """True if the engine does not say that it has the adapter. If it says no, it gets the adapter again."""
        url = f"{self._engine.url}/v1/models"
        limit = aiohttp.ClientTimeout(total=10)
        try:
            async with self._session.get(
                url, headers=self._engine.headers, timeout=limit
            ) as answer:
                found = await answer.json(content_type=None)
            if any(each["id"] == adapter.engine_name for each in found["data"]):
                return False
        except aiohttp.ClientConnectorError:
            self._engine.served.clear()
        except (ClientError, TimeoutError, ValueError, LookupError, TypeError):
            return True
        if self._engine.served.get(name) is adapter:
            self._engine.served.pop(name, None)
        self._wake()
        return True

    async def _feedback(self, request: web.Request) -> web.Response:
        try:
            said = json.loads(await request.read())
            id = said.pop("id")
            ((kind, value),) = said.items()
        except (LookupError, TypeError, ValueError, AttributeError):
            raise web.HTTPBadRequest(text=FEEDBACK) from None
        rated = kind == "rating" and type(value) is int and value in (1, -1)
        corrected = kind == "correction" and isinstance(value, str) and value.strip()
        if not isinstance(id, str) or not (rated or corrected):
            raise web.HTTPBadRequest(text=FEEDBACK)
        await self._require_key(request)
        assert self._keeper
        try:
            code = await asyncio.wait_for(asyncio.wrap_future(self._keeper.said(id, said)), 10)
        except TimeoutError:
            code = 503
        return web.Response(status=code, text=CODES[code])

    async def _require_key(self, request: web.Request) -> None:
        """Raise HTTPUnauthorized unless the engine accepts the request's API key, if it has any."""
        headers = {}
        if "Authorization" in request.headers:
            headers["Authorization"] = request.headers["Authorization"]
        try:
            async with self._session.get(
                f"{self._engine.url}/v1/models", headers=headers
            ) as answer:
                if answer.status in (401, 403):
                    raise web.HTTPUnauthorized(text="the engine does not accept this API key")
        except ClientError:
            raise _busy(f"the engine {self._engine.url} does not answer") from None

    def _begin_shadow(self, body: "_Body", content: bytes, champion: Adapter) -> None:
        self._shadows = [each for each in self._shadows if each.is_alive()]
        if body.large or len(self._shadows) >= SHADOWS:
            self._left_out.inc()
            return
        asked = (b"".join(body.parts), content, champion)
        self._shadows.append(threading.Thread(target=self._shadow, args=asked, daemon=True))
        self._shadows[-1].start()

    def _shadow(self, asked: bytes, content: bytes, champion: Adapter) -> None:
        """Append a row with the champion's answer to a chat, and the challenger's."""
        model = self._challenger.name
        wrong = (LookupError, TypeError, ValueError)
        with (
            self._asking.attempt(),
            as_user_error("an answer is not that of an OpenAI chat", *wrong),
        ):
            body = json.loads(asked)
            ours = told(content)
            adapter = self._engine.served.get(model)
            if ours.end != "stop" or adapter is None:
                return  # a call of a tool or a part of an answer; or the challenger has just gone
            again = {"model": adapter.engine_name, "stream": False, "stream_options": None}
            answer = self._engine.ask(CHAT, **body | again)
            self._count(model, adapter, answer.status_code)
            theirs = told(answer.content)
            both = {
                "champion": champion.name,
                "challenger": adapter.name,
                "answer": theirs.text,
                "finish_reason": theirs.end,
            }
            append(Path(self._rows), {**chat_row(body, ours.text), COLUMN: both})

    def _challenged(self) -> bool:
        ours = self._engine.served.get(self._challenger.name)
        theirs = self._engine.served.get(self._champion.name)
        if ours is None or theirs is None:
            return False
        recent = time.time() - self._challenger.answered < 5 * SECONDS
        return recent and ours.name == self._challenger.meant != theirs.name

    def _count(self, model: str, adapter: Adapter | None, code: int) -> None:
        self._requests.labels(model, adapter.name if adapter else "", code).inc()


class _Body:
    """A request's body, in parts. One of them is the model's name, if it is one that is followed."""

    held = 0
    """Bytes of all large ones."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.model = ""
        self.large = 0
        """Its bytes, if it is large."""
        self._named = 0
        """The part that is the name."""

    async def receive(self, request: web.Request, names: re.Pattern[bytes]) -> None:
        size = 0
        seen = b""
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > SMALL:
                _Body.held += size - self.large
                self.large = size
                if size > LARGEST:
                    raise web.HTTPRequestEntityTooLarge(LARGEST, size)
                if _Body.held > LARGEST_SUM:
                    raise _busy("too many large requests at once")
            if self.model:
                self.parts.append(chunk)
                continue
            seen += chunk
            # Quotes in a text have a backslash before them, so this is a key.
            found = names.search(seen)
            if found:
                begin, end = found.span(1)
                self.model = json.loads(b'"%s"' % found[1])
                self._named = len(self.parts) + 1
                self.parts += [seen[:begin], found[1]]
                seen = seen[end:]
            # The next chunk may end a name that has begun.
            self.parts.append(seen[:-1024])
            seen = seen[-1024:]
        self.parts.append(seen)

    def sent(self, adapter: Adapter | None) -> tuple[AsyncIterator[bytes] | bytes | None, int]:
        """Return what the engine gets, and its length."""
        if adapter:
            self.parts[self._named] = json.dumps(adapter.engine_name)[1:-1].encode()
        length = sum(map(len, self.parts))
        if self.large:
            return _streamed(self.parts), length  # not copied
        return b"".join(self.parts) or None, length


async def _streamed(parts: Sequence[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def _passing(headers: Any) -> Any:
    passing = headers.copy()
    for name in _OF_A_CONNECTION:
        passing.popall(name, None)
    return passing


def _forms(name: str) -> set[bytes]:
    """The name in JSON, by programs that escape and by those that do not."""
    return {json.dumps(name, ensure_ascii=escaped)[1:-1].encode() for escaped in (True, False)}


def _renaming(names: Mapping[str, str]) -> Callable[[bytes], bytes]:
    """Return a function that replaces the engine's names for models, in lines of its answer."""
    known = "|".join(map(re.escape, names)).encode()
    pattern = re.compile(rb'("(?:model|id)": ?")(%s)"' % known)
    return lambda content: pattern.sub(
        lambda found: found[1] + json.dumps(names[found[2].decode()])[1:].encode(), content
    )


def _busy(text: str) -> web.HTTPException:
    return web.HTTPServiceUnavailable(text=text, headers={"Retry-After": "1"})
