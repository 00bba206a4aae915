"""Planted mistakes of an attention or a model, and whether the self-test finds them before the first step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from olora_ray.common.errors import UserError
from olora_ray.model import attention
from olora_ray.train.self_test import check_adapters, choose_attention
from tests import tiny
from tests.families import zoo
from tests.families.row import PRECISIONS
from tests.families.variants import ALL

CPU = torch.device("cpu")
LENGTH = 512
PACKS = [
    tiny.pack(26, 121, 15, seed=1),
    tiny.pack(112, 230, seed=2),
    tiny.pack(19, 309, 18, seed=3),
]
Attend = Callable[..., tuple[Tensor, None]]


@dataclass(frozen=True)
class Planted:
    """A mistake: a wrong attention of this name, or a wrong model."""

    what: str
    attend: Attend = attention.segment_attention
    prepare: Callable[[Any], None] = lambda model: None
    family: str = "llama"
    window: int | None = None


def windowed(shorter: int) -> Attend:
    """Attention in segments with windows that are these many tokens too short."""

    def attend(
        _: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
    ) -> tuple[Tensor, None]:
        ways = query.shape[1] // key.shape[1]
        scores = query.float() @ key.repeat_interleave(ways, 1).mT.float() * named["scaling"]
        segment = torch.repeat_interleave(named["cu_seq_lens_q"].diff())
        place = torch.arange(len(segment))
        back = place[:, None] - place
        sees = (
            (back >= 0) & (back < named["sliding_window"] - shorter) & (segment[:, None] == segment)
        )
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        return (weights @ value.repeat_interleave(ways, 1).float()).to(query.dtype).transpose(
            1, 2
        ).contiguous(), None

    return attend


def steeper(*rest: Any, scaling: float, **named: Any) -> tuple[Tensor, None]:
    """A softmax scale that is 10 % too large."""
    return attention.segment_attention(*rest, **named | {"scaling": 1.1 * scaling})


def without_a_head(*rest: Any, **named: Any) -> tuple[Tensor, None]:
    """Attention without the last head."""
    found, _ = attention.segment_attention(*rest, **named)
    return torch.cat([found[:, :, :-1], 0 * found[:, :, -1:]], 2), None


def wrong_backward(
    module: Any, query: Tensor, key: Tensor, *rest: Any, **named: Any
) -> tuple[Tensor, None]:
    """A gradient of the keys that is 10 % too large."""
    return attention.segment_attention(
        module, query, 1.1 * key - 0.1 * key.detach(), *rest, **named
    )


def reaching(distance: int) -> Callable[[Any], None]:
    """A block that adds to each token something from the token so far before it, across examples."""

    def leak(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.cat(
            [hidden[:, :distance], hidden[:, distance:] + 0.1 * hidden[:, :-distance]], 1
        )
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return lambda model: model.model.layers[0].register_forward_hook(leak)


NONE = (
    Planted("none"),
    Planted("none, mixture of experts", family="mixtral"),
    Planted("none, window of 256 tokens", windowed(0), family="mistral", window=256),
)
MISTAKES = (
    Planted("softmax scale 10 % too large", steeper),
    Planted("softmax scale 10 % too large, mixture of experts", steeper, family="mixtral"),
    Planted("window of 16 tokens one too short", windowed(1), family="mistral", window=16),
    Planted("window of 256 tokens one too short", windowed(1), family="mistral", window=256),
    Planted("one of four heads left out", without_a_head),
    Planted("gradient of the keys 10 % too large", wrong_backward),
    *(Planted(f"leak of 10 % over {far} tokens", prepare=reaching(far)) for far in (1, 50, 300)),
    Planted(
        "leak of 10 % over 50 tokens, mixture of experts", prepare=reaching(50), family="mixtral"
    ),
)


def is_refused(planted: Planted, dtype: torch.dtype) -> bool:
    """Run the self-test of a tiny model with a mistake."""
    variant = ALL[planted.family]
    made = zoo.make(
        replace(variant, sizes={**variant.sizes, "sliding_window": planted.window}), dtype
    )
    planted.prepare(made)
    config = tiny.decided(data__max_length=LENGTH, model__attention="segments")
    trainer = tiny.trainer(config, model=made)
    with _in_place(planted.attend):
        try:
            name = choose_attention(trainer.loss, PACKS, config, CPU).attention
            check_adapters(trainer.loss, trainer.adapted, PACKS, name, CPU, new=True)
        except UserError:
            return True
    return False


@contextmanager
def _in_place(attend: Attend) -> Iterator[None]:
    """Register an attention under the name of another."""
    from transformers import AttentionInterface

    attention.register()
    AttentionInterface.register("segments", attend)
    try:
        yield
    finally:
        attention.register()


def table(mistakes: Sequence[Planted]) -> str:
    """Mistakes, and whether they are found, as Markdown."""
    lines = [("mistake", *PRECISIONS), ("---",) * (1 + len(PRECISIONS))]
    for each in mistakes:
        said = (
            "found" if is_refused(each, dtype) else "not found" for dtype in PRECISIONS.values()
        )
        lines.append((each.what, *said))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
