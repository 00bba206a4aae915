"""Attention inside segments by the kernel for variable lengths that torch brings along: on GPUs, without a package.

The layout is the flat one of segment_attention.py: a micro-batch is one row of T tokens, and the kernel is told the
borders of its segments. It is FlashAttention's (torch.nn.attention.varlen), so nothing grows with T^2, keys and values
of grouped heads are not copied, and windows are skipped rather than masked. As a whole (with a scale, windows and
grouped heads) torch has it since 2.12.

Shapes: H query heads share H' key and value heads; D is the size of a head.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.common.errors import UserError, first_line

NAME = "varlen"
_TAKES = frozenset({"scale", "window_size", "enable_gqa"})
_LENGTHS, _HEADS, _SIZE, _WINDOW = (3, 17, 40), (4, 2), 64, 5
"""Of the trial; some segments are longer than the window."""
_TOLERANCE = 0.03
"""Relative; bfloat16 explains less than a fifth of it, and a window of one token too many is ten times as far off."""


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, and within a window of `sliding_window` tokens if there is one.

    query (1, H, T, D), key and value (1, H', T, D), of which the values may be narrower; `cu_seq_lens_q` (int32) holds
    the segments' borders 0 = c0 < c1 < ... = T, `max_length_q` is the longest; the result is (1, T, H, D). Raises
    UserError for what a family asks for and the kernel does not do, and where the borders do not arrive.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise UserError("model.attention: this model does not tell its attention where examples begin; set it to sdpa")
    if softcap is not None or s_aux is not None:
        raise UserError("model.attention: this model caps or sinks its attention; set it to eager")
    size, narrow = query.shape[-1], value.shape[-1]
    if size % 8 or size > 256 or 192 < size <= 224 or narrow > size:  # the last: not backward, on some GPUs
        raise UserError(f"model.attention: heads of {size} and {narrow} are not for its kernel; set it to sdpa")
    left = -1 if sliding_window is None or sliding_window >= max_length_q else sliding_window - 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, F.pad(value, (0, size - narrow)) if narrow < size else value))
    attend = kernel()
    assert attend is not None
    found = attend(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling if scaling is not None else size**-0.5,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return found[None, :, :, :narrow], None


@lru_cache(maxsize=1)
def kernel() -> Callable[..., Tensor] | None:
    """torch.nn.attention.varlen.varlen_attn; None where torch does not have it, or not yet as a whole."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found: Any = varlen_attn
    return found if inspect.signature(found).parameters.keys() >= _TAKES else None


@lru_cache(maxsize=8)
def trial(dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with the kernel on this device, or None: outputs and gradients of a few short segments.

    The self-test (train/self_test.py) looks at outputs of the model alone; a kernel that fails, or errs, in the
    backward pass would be met in the first step.
    """
    try:
        worst = max(_difference(dtype, device, window) for window in (None, _WINDOW))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        return f"its kernel fails here: {first_line(error)}"
    return None if worst <= _TOLERANCE else f"its kernel is off by {worst:.2g} here"


def _difference(dtype: torch.dtype, device: torch.device, window: int | None) -> float:
    """The largest relative difference of output and gradients from the definition in float32."""
    generator = torch.Generator().manual_seed(0)
    total, (ours, theirs) = sum(_LENGTHS), _HEADS
    drawn = [torch.randn(1, heads, total, _SIZE, generator=generator) for heads in (ours, theirs, theirs, ours)]
    q, k, v, weights = (x.to(device, dtype).requires_grad_() for x in drawn)
    borders = torch.tensor([0, *_LENGTHS]).cumsum(0).to(device, torch.int32)
    found, _ = varlen_attention(
        nn.Module(), q, k, v, None, cu_seq_lens_q=borders, max_length_q=max(_LENGTHS), sliding_window=window
    )
    exact = q_, k_, v_ = tuple(x.detach().float().requires_grad_() for x in (q, k, v))
    expected = _definition(q_, k_, v_, window)
    w = weights.detach().transpose(1, 2)
    pairs = zip(
        (found, *torch.autograd.grad(found, (q, k, v), w)),
        (expected, *torch.autograd.grad(expected, exact, w.float())),
        strict=True,
    )
    parts = [float((got.detach().float() - right.detach()).norm() / right.detach().norm()) for got, right in pairs]
    return max(part if part == part else float("inf") for part in parts)


def _definition(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """The trial's attention with a mask over everything; (1, T, H, D)."""
    lengths = torch.tensor(_LENGTHS, device=query.device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), lengths)
    place = torch.arange(len(segment), device=query.device)
    back = place[:, None] - place
    sees = (segment[:, None] == segment) & (back >= 0) & (back < (window or len(segment)))
    ways = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(ways, 1).mT * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    found: Tensor = weights @ value.repeat_interleave(ways, 1)
    return found.transpose(1, 2)
