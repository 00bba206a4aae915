"""torch's kernel for variable lengths on a CPU, where it has none: slow, by its definition.

What FlashAttention documents of its arguments, so that everything around the kernel can be tested without a GPU: the
calls that torch.nn.attention.varlen makes of ours, and what a model does with the result. That the kernel itself does
this is for tests marked gpu.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@contextmanager
def varlen_on_cpu(wider: int = 0) -> Iterator[None]:
    """The kernel has a CPU version; it looks `wider` tokens too far back in a window."""

    def computed(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, rest: Any, named: Any) -> Tensor:
        parts = [
            _attended(q[part], k[part], v[part], rest, named, wider) for part in _segments(borders)
        ]
        return torch.cat(parts).to(q.dtype)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, borders: Tensor, *rest: Any, **named: Any
    ) -> tuple[Tensor, ...]:
        _check(q, v, borders, rest)
        out = computed(q, k, v, borders, rest, named)
        state = torch.zeros(2, dtype=torch.uint64)
        return out, torch.zeros(q.shape[1], q.shape[0]), state, torch.zeros(0), torch.zeros(0)

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        _: Tensor,
        borders: Tensor,
        *rest: Any,
        **named: Any,
    ) -> tuple[Tensor, ...]:
        _, back = torch.func.vjp(lambda q, k, v: computed(q, k, v, borders, rest, named), q, k, v)
        return tuple(back(grad))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _check(query: Tensor, value: Tensor, borders: Tensor, rest: Any) -> None:
    """What the kernel demands; `rest` begins with the borders of the keys, the longest segments and the dropout."""
    theirs, longest, _, dropout, *_ = rest
    assert query.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert borders.dtype == theirs.dtype == torch.int32
    assert longest == int(borders.diff().max())
    assert dropout == 0.0


def _segments(borders: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(borders.tolist())]


def _attended(
    query: Tensor, key: Tensor, value: Tensor, rest: Any, named: Any, wider: int
) -> Tensor:
    """Of one segment: what its queries get of its values (L, H, D)."""
    causal, left = rest[4], named["window_size_left"]
    assert causal or named["window_size_right"] == 0
    ways = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1).float() for x in (query, key, value))
    k, v = (x.repeat_interleave(ways, 0) for x in (k, v))
    place = torch.arange(len(query))
    back = place[:, None] - place
    sees = (back >= 0) & (back <= (left + wider if left >= 0 else len(query)))
    weights = (q @ k.mT * named["scale"]).masked_fill(~sees, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1)
