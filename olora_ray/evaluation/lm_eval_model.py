"""A model for lm-eval whose requests are answered by actors all over the cluster.

lm-eval itself stays whole: it builds the requests of all tasks and makes the metrics of the answers here, in the
driver, and on each actor its own `HFLM` computes them. So nothing is merged but lists of answers, and the result is
lm-eval's whatever the number of actors. Importing this module needs the extra `eval`.
"""

import logging
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from olora_ray.cluster.device import assigned_device
from olora_ray.common.quiet import quiet_lm_eval
from olora_ray.config.evaluation import AnyConfig
from olora_ray.evaluation import held_out, pool
from olora_ray.model.load import load_tokenizer
from olora_ray.model.source import BaseModel, on_this_node

logger = logging.getLogger(__name__)

PIECE = 64
"""Requests that travel together."""
BATCH = 8
"""Requests that go through the model at once."""

Piece = tuple[str, tuple[tuple[Any, ...], ...]]
"""(method of HFLM, arguments of each request)."""


class ClusterLM(LM):  # type: ignore[misc] # lm-eval is untyped
    """Spreads what lm-eval asks over the cluster; needs ray.init."""

    def __init__(self, base: BaseModel, adapter: str | None, config: AnyConfig) -> None:
        """`base` and `adapter` as in `measure`."""
        super().__init__()
        self._make = partial(HarnessModel, base, adapter, config)
        self._config = config

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) of each (context, continuation)."""
        return self._spread("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Log-probability of each text."""
        return self._spread("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """A continuation of each (context, settings)."""
        return self._spread("generate_until", requests)

    def _spread(self, method: str, requests: list[Any]) -> list[Any]:
        # Long ones first, so that no actor is left with one at the end; alike ones together, for less padding.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
        places = [order[i : i + PIECE] for i in range(0, len(order), PIECE)]
        works: list[Piece] = [(method, tuple(requests[i].args for i in place)) for place in places]
        logger.info(f"tasks: {len(requests):,} requests")
        done = pool.map_over_actors(self._make, works, self._config)
        answers: dict[int, Any] = {}
        for place, found in zip(places, done, strict=True):
            answers |= zip(place, found, strict=True)
        return [answers[i] for i in range(len(requests))]


class HarnessModel:
    """One model in an actor, behind lm-eval's interface."""

    def __init__(self, base: BaseModel, adapter: str | None, config: AnyConfig) -> None:
        """Load the model where this process computes; raises UserError if it does not load."""
        from lm_eval.models.huggingface import HFLM

        quiet_lm_eval()
        model = held_out.load(base, adapter, config, assigned_device())
        # Attention that takes batches of padded rows; not every family has sdpa.
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        tokenizer = load_tokenizer(on_this_node(base, config), config.model)
        self._inner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)

    def __call__(self, work: Piece) -> list[Any]:
        """The answers, in order."""
        method, arguments = work
        requests = [Instance("loglikelihood", {}, each, idx=i) for i, each in enumerate(arguments)]
        return list(getattr(self._inner, method)(requests, disable_tqdm=True))
