"""vLLM's plug-in: a request's model NAME@ALIAS or NAME@VERSION is an adapter that MLflow has (MLFLOW_TRACKING_URI).

vLLM asks a resolver only for a model that it does not have. So each alias that was asked for is followed from then on:
when it moves, vLLM loads the adapter of the new version under another id and path, and the name stands for it from the
next request. Requests that have begun keep the adapter of theirs, and no cached block of one is used for the other.
"""

import asyncio
import logging
import os
import sys
from functools import cache
from typing import Any

from olora_ray.serving.watch import SECONDS, Adapter, Attempts, Watch
from olora_ray.tracking import start

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the resolver. vLLM calls this in each of its processes."""
    if os.environ.get(start.VARIABLE):
        from vllm.lora.resolver import LoRAResolverRegistry

        LoRAResolverRegistry.register_resolver("olora_ray", Resolver())


class Resolver:
    def __init__(self) -> None:
        self._known = dict[str, tuple[Watch, Attempts]]()
        self._followed = dict[str, asyncio.Task[None]]()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return vLLM's request for the adapter of NAME@ALIAS; None for another name, or if there is none."""
        if "@" not in lora_name.strip("@"):
            return None
        # vLLM hands its models and its engine to no resolver; its method that awaits this one has them.
        vllm = sys._getframe(1).f_locals["self"]
        _log_as_vllm()
        if lora_name not in self._known:
            self._known[lora_name] = Watch(lora_name, start.chosen_uri(None)), Attempts(lora_name)
        watch, attempts = self._known[lora_name]
        adapter = await asyncio.to_thread(watch.look)
        if not adapter or attempts.resting(str(adapter)):
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
    from vllm.lora.request import LoRARequest

    # The id of the first version of a name is vLLM's own: it counts the names that it has resolved.
    return LoRARequest(lora_name=name, lora_int_id=adapter.id, lora_path=str(adapter.folder))


@cache
def _log_as_vllm() -> None:
    ours = logging.getLogger("olora_ray")
    handlers = logging.getLogger("vllm").handlers
    ours.setLevel(logging.INFO)
    ours.propagate = not handlers
    for handler in handlers:
        ours.addHandler(handler)
