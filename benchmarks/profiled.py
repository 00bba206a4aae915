"""Time of a training by category, from the operations that torch.profiler records.

An operation belongs to the nearest part of the model around it. Parts are marked around `forward`; an operation of
autograd belongs to the part that created its node, which the profiler's sequence numbers tell. Matrix products are a
category of their own, except inside attention, head and loss.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.train.sharded_reader import decoder_layers

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::linear",
    "aten::matmul",
    "aten::_addmm",
)
LOW_RANK = "low-rank elementwise"
CATEGORIES = (
    "matrix products",
    "attention",
    "norms",
    "activation functions",
    "head and loss",
    LOW_RANK,
    "optimizer",
    "data",
    "other",
)
MARK = "part: "


def where(trainer: Any, run: Callable[[], Iterable[Any]]) -> tuple[dict[str, float], float]:
    """Return seconds by category and in total for a run whose steps (`StepResult`) are consumed here.

    The run marks the calls of the trainer's model permanently, so the trainer cannot be used afterwards.
    """
    mark(trainer)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        steps = list(run())
    total = sum(step.seconds for step in steps)
    return shares(found.events(), total, sum(step.waited for step in steps)), total


def mark(trainer: Any) -> None:
    for module in trainer.loss.model.modules():
        if type(module).__name__.endswith("Norm"):
            _mark(module, "forward", "norms")
        elif isinstance(module, AdaptedWeight):
            _mark(module, "forward", LOW_RANK)
    for block in decoder_layers(trainer.loss.model):
        for name, part in block.named_children():
            if "attn" in name or "attention" in name:
                # A norm before the attention may have "attn" in its name too.
                if not type(part).__name__.endswith("Norm"):
                    _mark(part, "forward", "attention")
            elif any(word in name for word in ("mlp", "feed_forward", "ffn")):
                _mark(part, "forward", "activation functions")
    _mark(trainer.loss, "logits", "head and loss")
    _mark(trainer.optimizer, "step", "optimizer")


def shares(events: Iterable[Any], total: float, waited: float) -> dict[str, float]:
    """Return seconds by category; Python between operations counts as "other"."""
    known = list(events)
    made_in = parts_of_nodes(known)
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for event in known:
        if event.self_cpu_time_total > 0:
            seconds[category(event, made_in)] += event.self_cpu_time_total / 1e6
    seconds["data"] += waited
    seconds["other"] += max(0.0, total - sum(seconds.values()))
    return seconds


def category(event: Any, made_in: dict[int, str]) -> str:
    """Return the category of an operation; `made_in`: autograd sequence number -> part of the model."""
    part = _part(event, made_in)
    if event.name in PRODUCTS and part in (None, LOW_RANK, "activation functions"):
        return "matrix products"
    return part or "other"


def _part(event: Any, made_in: dict[int, str]) -> str | None:
    here = event
    while here is not None:
        if here.name.startswith(MARK):
            return str(here.name.removeprefix(MARK))
        if here.name.startswith("_ChunkedLoss"):
            return "head and loss"
        if _is_backward(here) and here.sequence_nr in made_in:
            return made_in[here.sequence_nr]
        here = here.cpu_parent
    return None


def parts_of_nodes(events: Iterable[Any]) -> dict[int, str]:
    makers = {
        event.sequence_nr: event
        for event in events
        if event.sequence_nr >= 0 and not _is_backward(event)
    }
    parts = {number: _part(event, {}) for number, event in makers.items()}
    return {number: part for number, part in parts.items() if part is not None}


def _is_backward(event: Any) -> bool:
    return "evaluate_function" in event.name or event.scope == 1


def _mark(owner: Any, attribute: str, category: str) -> None:
    inner = getattr(owner, attribute)

    @functools.wraps(inner)
    def marked(*arguments: Any, **named: Any) -> Any:
        with record_function(MARK + category):
            return inner(*arguments, **named)

    # Set on the instance, not on its class, which other parts share.
    object.__setattr__(owner, attribute, marked)
