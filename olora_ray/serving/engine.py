"""The HTTP interface of a vLLM or SGLang server: what `olora-ray follow` asks of it."""

import logging
import time
from contextlib import suppress
from typing import Any

import requests

from olora_ray.common import tried
from olora_ray.common.errors import TryAgain, UserError, as_user_error
from olora_ray.common.secrets import looked_up
from olora_ray.serving.watch import SECONDS, Adapter
from olora_ray.tracking.client import reason

logger = logging.getLogger(__name__)

# Older ones answer with what they cached for the version before, if both have the same name.
OLDEST_THAT_REPLACES = "0.31"


class Engine:
    def __init__(self, url: str, base: str | None, key: str | None, behind: bool = False) -> None:
        """`behind`: clients do not ask the engine, so that each version can have a name of its own there."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._base = base
        self._behind = behind
        self.headers = {}
        if key:
            if not key.startswith(("env:", "file:")):
                raise UserError(
                    "argument --key: expected env:VARIABLE or file:/PATH, which `ps` may show"
                )
            self.headers["Authorization"] = f"Bearer {looked_up(key, '--key')}"
        self.served: dict[str, Adapter] = {}
        """Model -> the version that answers as it, as far as is known."""
        self.answered = time.time()
        """The time of the engine's last answer."""
        self._version = ""
        self._loaded: dict[str, float] = {}
        """Engine's name of a version -> the time when something was last served with it."""

    def serve(self, name: str, adapter: Adapter) -> None:
        """Let the engine answer as the model `name` with this adapter; do nothing if it already does.

        Raises UserError for a refusal, TryAgain if the engine is unreachable.
        """
        try:
            with as_user_error(f"{self.url} is not vLLM or SGLang", LookupError, ValueError):
                own, *others = self.ask("/v1/models").json()["data"]
                sglang = own.get("owned_by") == "sglang"
                self._check_version(sglang, moves=name != adapter.name)
        except TryAgain:
            self._version = ""
            self.served.clear()
            raise
        folder = str(adapter.folder)
        known = name
        if self._behind:
            known = adapter.engine_name
        before = next((each["root"] for each in others if each["id"] == known), None)
        if before != folder:
            adapter.check_base(self._base or own["root"])
            self._load(known, folder, before, sglang)
            logger.info(f"{name}: {adapter} answers at {self.url}")
        self.served[name] = adapter
        if self._behind:
            self._unload(sglang)

    def _check_version(self, sglang: bool, moves: bool) -> None:
        program = "SGLang" if sglang else "vLLM"
        if not self._version:
            path = "/get_server_info" if sglang else "/version"
            self._version = str(self.ask(path).json()["version"])
            tried.tell(program, self._version)
        if tried.is_older(self._version, tried.TRIED[program][0]):
            raise UserError(
                f"{self.url} is {program} {self._version}; {tried.shown(program)}: install a newer one"
            )
        replaces = moves and not sglang and not self._behind
        if replaces and tried.is_older(self._version, OLDEST_THAT_REPLACES):
            raise UserError(
                f"{self.url} is vLLM {self._version}, which would answer with cached blocks of the version before: use"
                f" --listen, the plug-in, or vLLM {OLDEST_THAT_REPLACES}"
            )

    def _load(self, name: str, folder: str, before: str | None, sglang: bool) -> None:
        if not sglang:
            self.ask(
                "/v1/load_lora_adapter",
                lora_name=name,
                lora_path=folder,
                load_inplace=before is not None,
            )
            return
        # SGLang replaces no adapter, and lets running requests end before it unloads one.
        if before:
            self.ask("/unload_lora_adapter", lora_name=name)
        try:
            self.ask("/load_lora_adapter", lora_name=name, lora_path=folder)
        except UserError:
            with suppress(UserError):
                if before:
                    self.ask("/load_lora_adapter", lora_name=name, lora_path=before)
            raise

    def _unload(self, sglang: bool) -> None:
        """Unload the versions that nothing was served with for some seconds; a request for one may be on its way."""
        now = time.monotonic()
        for adapter in [*self.served.values()]:
            self._loaded[adapter.engine_name] = now
        path = "/unload_lora_adapter" if sglang else "/v1/unload_lora_adapter"
        for name, last in [*self._loaded.items()]:
            if now - last > SECONDS:
                del self._loaded[name]
                # SGLang answers when the running requests have ended.
                with suppress(UserError):
                    self.ask(path, timeout=2 * SECONDS, lora_name=name)

    def ask(self, path: str, timeout: float = 120, **body: Any) -> requests.Response:
        method = "POST" if body else "GET"
        url = f"{self.url}{path}"
        try:
            # Loading an adapter waits for the step that the engine computes.
            answer = requests.request(
                method, url, json=body or None, headers=self.headers, timeout=timeout
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
