"""vLLM's plug-in: a request's model NAME@ALIAS or NAME@VERSION is an adapter that MLflow has (MLFLOW_TRACKING_URI).

vLLM asks a resolver only for a model that it does not have. So each alias that was asked for is followed from then on:
when it moves, vLLM loads the adapter of the new version under another id and path, and the name stands for it from the
next request. Requests that have begun keep the adapter of theirs. Inside vLLM each adapter has a name of its own, since
the prefix cache knows an adapter by its name, up to vLLM 0.30 by nothing else; clients see the names that they ask for.
"""

import asyncio
import logging
import os
import sys
import time
from functools import cache
from typing import Any

from olora_ray.serving.watch import SECONDS, Adapter, Attempts, Watch
from olora_ray.tracking import start

logger = logging.getLogger(__name__)

# For this long a name that MLflow does not have is not looked up again, and of so many names at most.
UNKNOWN_SECONDS = 10.0
UNKNOWN = 100


def register() -> None:
    """Register the resolver. vLLM calls this in each of its processes."""
    if os.environ.get(start.VARIABLE):
        from vllm.lora.resolver import LoRAResolverRegistry

        LoRAResolverRegistry.register_resolver("olora_ray", Resolver())


class Resolver:
    def __init__(self) -> None:
        self._known = dict[str, tuple[Watch, Attempts]]()
        self._unknown = dict[str, float]()
        """Name -> the time when it may be looked up again. Any client can ask for any name."""
        self._followed = dict[str, asyncio.Task[None]]()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return vLLM's request for the adapter of NAME@ALIAS; None for another name, or if there is none."""
        if "@" not in lora_name.strip("@"):
            return None
        now = time.monotonic()
        self._unknown = {name: until for name, until in self._unknown.items() if until > now}
        if lora_name in self._unknown and lora_name not in self._known:
            return None
        if (
            len(self._unknown) >= UNKNOWN
        ):  # invented names must not keep another one from being found
            self._unknown.clear()
        # vLLM hands its models and its engine to no resolver; its method that awaits this one has them.
        vllm = sys._getframe(1).f_locals["self"]
        _log_as_vllm()
        watch, attempts = self._known.get(lora_name) or (
            Watch(lora_name, start.chosen_uri(None)),
            Attempts(lora_name),
        )
        adapter = await asyncio.to_thread(watch.look)
        if not adapter:
            self._unknown[lora_name] = now + UNKNOWN_SECONDS
            return None
        self._known[lora_name] = watch, attempts
        _show_names_as_asked(vllm)
        if attempts.resting(str(adapter)):
            return None
        with attempts.attempt(str(adapter)):
            await asyncio.to_thread(adapter.check_base, base_model_name, vllm.model_config.revision)
            if watch.is_alias and lora_name not in self._followed:
                self._followed[lora_name] = asyncio.create_task(_follow(vllm, watch, attempts))
            return _request(lora_name, adapter)
        return None


async def _follow(vllm: Any, watch: Watch, attempts: Attempts) -> None:
    while True:
        await asyncio.sleep(SECONDS)
        adapter = await asyncio.to_thread(watch.look)
        now = vllm.lora_requests.get(watch.name)
        if not adapter or not now or now.lora_path == str(adapter.folder):
            continue
        if attempts.resting(str(adapter)):
            continue
        with attempts.attempt(str(adapter)):
            model = vllm.model_config
            await asyncio.to_thread(adapter.check_base, model.model, model.revision)
            request = _request(watch.name, adapter)
            # Raises if vLLM refuses it, for example because of its rank.
            await vllm.engine_client.add_lora(request)
            vllm.lora_requests[watch.name] = request
            logger.info(f"{watch.name}: {adapter} answers")


def _request(name: str, adapter: Adapter) -> Any:
    request = _request_class()(adapter.engine_name, adapter.id, str(adapter.folder))
    request.asked = name  # not sent to vLLM's engine
    return request


@cache
def _request_class() -> Any:
    from vllm.lora.request import LoRARequest

    class Request(LoRARequest, dict=True):  # type: ignore[call-arg, misc] # vLLM is not installed here
        """A request whose id stays. vLLM sets one per asked name, and takes equal names in a batch for one adapter."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name != "lora_int_id":
                super().__setattr__(name, value)

    return Request


def _show_names_as_asked(vllm: Any) -> None:
    """Let the answers and the list of models name an adapter as clients do."""
    if "model_name" in vars(vllm):
        return
    model_name = vllm.model_name
    show = vllm.show_available_models

    def named(request: Any = None) -> str:
        return getattr(request, "asked", "") or model_name(request)

    async def shown() -> Any:
        found = await show()
        for card, name in zip(reversed(found.data), reversed(vllm.lora_requests), strict=False):
            card.id = name
        return found

    vllm.model_name = named
    vllm.show_available_models = shown


@cache
def _log_as_vllm() -> None:
    ours = logging.getLogger("olora_ray")
    handlers = logging.getLogger("vllm").handlers
    ours.setLevel(logging.INFO)
    ours.propagate = not handlers
    for handler in handlers:
        ours.addHandler(handler)
