"""Let an inference engine follow an alias: it answers with the version to which the alias points, within five seconds.

    olora-ray follow NAME@ALIAS --engine URL [--base FOLDER] [--key KEY]
    olora-ray follow NAME@ALIAS --mirror PLACE

NAME@ALIAS      a registered model and its alias (chats@champion), or a version (chats@7)
--engine        a vLLM or SGLang server on this machine, http://HOST:PORT: it serves the adapter as the model NAME@ALIAS
--base          the folder of the engine's base model, if the engine does not name one that this process can read
--key           the engine's API key: env:VARIABLE or file:/PATH
--mirror        a folder or bucket that gets each version as PLACE/NAME@VERSION, where Ray Serve LLM loads adapters
                (dynamic_lora_loading_path), and then the file PLACE/NAME@ALIAS with the name of that folder
--cache         a folder for the adapters, which the engine can read; default: ~/.cache/olora_ray/adapters
--tracking-uri  as for `olora-ray registry`

The command asks MLflow every two seconds and prints a line per change. It loads a version only if all its files have
their checksums and the engine has its base model; otherwise, and while MLflow is unreachable, the engine keeps the
version that it has. An engine that was restarted gets the adapter again. SIGTERM or Ctrl+C ends the command; the engine
keeps its adapter.

Exit codes: 0 ended by a signal; 2 an error that you can fix.
"""

import logging
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import requests

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import TryAgain, UserError, as_user_error
from olora_ray.common.logs import quiet_environment
from olora_ray.common.secrets import looked_up
from olora_ray.config import command_line
from olora_ray.serving.watch import CACHE, SECONDS, Adapter, Attempts, Watch
from olora_ray.tracking import start
from olora_ray.tracking.client import reason

logger = logging.getLogger(__name__)

OPTIONS = ["--engine", "--base", "--key", "--mirror", "--cache", "--tracking-uri"]


def main(argv: list[str]) -> None:
    parsed = command_line.parse(argv or ["--help"], __doc__ or "", options=OPTIONS)
    options = parsed.options
    if len(parsed.words) != 1 or not options.keys() & {"--engine", "--mirror"}:
        raise UserError("usage: olora-ray follow NAME@ALIAS --engine URL, or --mirror PLACE, or both; see --help")
    quiet_environment()  # before MLflow is imported
    (name,) = parsed.words
    given: list[Callable[[Adapter], None]] = []
    if "--engine" in options:
        given.append(partial(Engine(options["--engine"], options.get("--base"), options.get("--key")).serve, name))
    if "--mirror" in options:
        given.append(partial(Mirror(options["--mirror"]).write, name))
    cache = Path(command_line.absolute(options.get("--cache", str(CACHE)), Path.cwd()))
    watch = Watch(name, start.chosen_uri(options.get("--tracking-uri")), cache)
    attempts = [Attempts(name) for _ in given]
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.is_set():
        if adapter := watch.look():
            for give, each in zip(given, attempts, strict=True):
                if not each.resting(str(adapter)):
                    with each.attempt(str(adapter)):
                        give(adapter)
        stop.wait(SECONDS)
    logger.info(f"{name}: not followed any more; the engine keeps its adapter")


class Engine:
    """The HTTP interface of a vLLM or SGLang server."""

    def __init__(self, url: str, base: str | None, key: str | None) -> None:
        self._url, self._base = url.rstrip("/").removesuffix("/v1"), base
        self._headers = {"Authorization": f"Bearer {looked_up(key, '--key')}"} if key else {}

    def serve(self, name: str, adapter: Adapter) -> None:
        """Let the engine answer as the model `name` with this adapter; do nothing if it already does.

        Raises UserError for a refusal, TryAgain if the engine is unreachable.
        """
        with as_user_error(f"{self._url} is not vLLM or SGLang", LookupError, ValueError):
            own, *others = self._ask("/v1/models").json()["data"]
        before = next((each["root"] for each in others if each["id"] == name), None)
        if before == str(adapter.folder):
            return
        adapter.check_base(self._base or own["root"])
        # SGLang replaces no adapter, and lets running requests end before it unloads one.
        if own.get("owned_by") == "sglang":
            load = partial(self._ask, "/load_lora_adapter", lora_name=name)
            if before:
                self._ask("/unload_lora_adapter", lora_name=name)
            try:
                load(lora_path=str(adapter.folder))
            except UserError:
                with suppress(UserError):
                    if before:
                        load(lora_path=before)
                raise
        else:
            folder = str(adapter.folder)
            self._ask("/v1/load_lora_adapter", lora_name=name, lora_path=folder, load_inplace=before is not None)
        logger.info(f"{name}: {adapter} answers at {self._url}")

    def _ask(self, path: str, **body: Any) -> requests.Response:
        try:
            answer = requests.request(
                "POST" if body else "GET",
                f"{self._url}{path}",
                json=body or None,
                headers=self._headers,
                timeout=120,  # loading an adapter waits for the step that the engine computes
            )
        except requests.RequestException as error:
            raise TryAgain(f"the engine {self._url} does not answer ({reason(error)})") from None
        if answer.status_code >= 400:
            advice = "; start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if answer.status_code == 404 else ""
            text = f"the engine {self._url} refuses {path}: {answer.status_code} {' '.join(answer.text[:500].split())}"
            raise (TryAgain if answer.status_code in (502, 503, 504) else UserError)(f"{text}{advice}")
        return answer


class Mirror:
    """A folder or bucket of adapters for Ray Serve LLM, which loads a folder once, so each version has its own."""

    def __init__(self, place: str) -> None:
        self._place, self._written = command_line.absolute(place, Path.cwd()), ""

    def write(self, name: str, adapter: Adapter) -> None:
        folder = f"{adapter.version.name}@{adapter.version.number}"
        if folder == self._written:
            return
        # Ray Serve LLM asks for this file first.
        node_cache.upload(adapter.folder, storage.join(self._place, folder), last="adapter_config.json")
        storage.write_text(storage.join(self._place, name), f"{folder}\n")
        self._written = folder
        logger.info(f"{name}: {adapter} lies in {storage.join(self._place, folder)}")
