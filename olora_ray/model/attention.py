"""Choice of a model's attention: what its family, its precision and the device support, the fastest first.

The self-test (train/self_test.py) checks whether an implementation computes the same as the model's own.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.common.device import lacks_memory
from olora_ray.common.errors import UserError, first_line
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.config.section import is_auto

# Attention inside segments by torch's own kernel for variable lengths: on GPUs, without another package.


VARLEN = "varlen"
NO_BORDERS = "model.attention: the model's code does not say where an example ends; set model.attention: sdpa"
_TAKES = frozenset({"scale", "window_size"})
# Segments, heads, head size and window of the trial; some segments are longer than the window.
_LENGTHS = (3, 17, 40)
_HEADS = (4, 2)
_SIZE = 64
_WINDOW = 5
# Relative. bfloat16 explains less than a fifth of it, and a window of one token too many gives ten times as much.
_TOLERANCE = 0.03


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
    """Compute causal attention within each segment, and within a window of `sliding_window` tokens if it is set.

    query (1, H, T, D), key and value (1, H', T, D), of which the values may be narrower; `cu_seq_lens_q` (int32)
    holds the segments' borders 0 = c0 < c1 < ... = T, `max_length_q` is the longest; the result is (1, T, H, D).
    Raise UserError for what a family asks for and the kernel does not do, and if the borders do not arrive.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise UserError(NO_BORDERS)
    if softcap is not None or s_aux is not None:
        raise UserError(
            "model.attention: the model has a softcap or attention sinks; set model.attention: eager"
        )
    size = query.shape[-1]
    narrow = value.shape[-1]
    # Heads of 200 to 224 have no backward pass on some GPUs.
    if size % 8 or size > 256 or 192 < size <= 224 or narrow > size:
        raise UserError(
            f"model.attention: the kernel takes no heads of {size} and {narrow}; set model.attention: sdpa"
        )
    left = -1
    if sliding_window is not None and sliding_window < max_length_q:
        left = sliding_window - 1
    if narrow < size:
        value = F.pad(value, (0, size - narrow))
    if scaling is None:
        scaling = size**-0.5
    # Not x[0], whose backward pass fills zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    attend = kernel()
    assert attend is not None
    output = attend(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    if narrow < size:
        output = output[:, :, :narrow]
    return output.unsqueeze(0), None


@lru_cache(maxsize=1)
def kernel() -> Callable[..., Tensor] | None:
    """Return torch.nn.attention.varlen.varlen_attn; None if torch lacks it, or a parameter of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    function: Any = varlen_attn
    takes = inspect.signature(function).parameters.keys()
    if not takes >= _TAKES:
        return None
    if "enable_gqa" in takes:
        return function  # type: ignore[no-any-return]
    # torch 2.11 takes grouped heads without it.
    return lambda *given, enable_gqa, **named: function(*given, **named)


@lru_cache(maxsize=8)
def trial(dtype: torch.dtype, device: torch.device) -> str | None:
    """Run the kernel forward and backward on a few short segments; return what is wrong on this device, or None.

    The self-test (train/self_test.py) sees only outputs of the model. Without this trial, the first step would be the
    first to meet a kernel that fails or errs in the backward pass.
    """
    try:
        worst = max(_difference(dtype, device, window) for window in (None, _WINDOW))
    except Exception as error:
        if lacks_memory(error, device):
            raise
        return f"its kernel fails here: {first_line(error)}"
    if worst <= _TOLERANCE:
        return None
    return f"its kernel has a relative error of {worst:.2g} here"


def _difference(dtype: torch.dtype, device: torch.device, window: int | None) -> float:
    generator = torch.Generator().manual_seed(0)
    total = sum(_LENGTHS)
    ours, theirs = _HEADS
    drawn = [
        torch.randn(1, heads, total, _SIZE, generator=generator)
        for heads in (ours, theirs, theirs, ours)
    ]
    q, k, v, weights = (x.to(device, dtype).requires_grad_() for x in drawn)
    borders = torch.tensor([0, *_LENGTHS]).cumsum(0).to(device, torch.int32)
    output, _ = varlen_attention(
        nn.Module(),
        q,
        k,
        v,
        None,
        cu_seq_lens_q=borders,
        max_length_q=max(_LENGTHS),
        sliding_window=window,
    )
    exact = tuple(x.detach().float().requires_grad_() for x in (q, k, v))
    q_, k_, v_ = exact
    expected = _definition(q_, k_, v_, window)
    w = weights.detach().transpose(1, 2)
    gradients = torch.autograd.grad(output, (q, k, v), w)
    expected_gradients = torch.autograd.grad(expected, exact, w.float())
    worst = 0.0
    for got, right in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        error = float((got.detach().float() - right.detach()).norm() / right.detach().norm())
        if math.isnan(error):
            return math.inf
        worst = max(worst, error)
    return worst


def _definition(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    lengths = torch.tensor(_LENGTHS, device=query.device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), lengths)
    position = torch.arange(len(segment), device=query.device)
    back = position[:, None] - position
    sees = (segment[:, None] == segment) & (back >= 0) & (back < (window or len(segment)))
    ways = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(ways, 1).mT * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    output: Tensor = weights @ value.repeat_interleave(ways, 1)
    return output.transpose(1, 2)


FLASH = "flash_attention_2"
# The class property by which transformers marks that a model supports an implementation; all support eager.
_SUPPORT = {
    "segments": "_supports_attention_backend",
    VARLEN: "_supports_attention_backend",
    FLASH: "_supports_flash_attn",
    "sdpa": "_supports_sdpa",
}


def candidates(
    model: nn.Module, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[str, ...]:
    """Return the implementations to be tried, in this order; if the config names one, only that one.

    Raise UserError if the config names one that the family, the precision or the device does not have.
    """
    if not is_auto(config.attention):
        problem = _unusable(model, config.attention, dtype, device)
        if problem:
            raise UserError(
                f"model.attention={config.attention}: {problem}; set model.attention: auto"
            )
        return (config.attention,)
    return tuple(
        name for name, problem in _in_order(model, dtype, device).items() if problem is None
    )


def left_out(
    model: nn.Module, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, str]:
    """Return the faster implementations that are no candidates on a GPU, and why; none if the config names one."""
    if not is_auto(config.attention) or device.type == "cpu":
        return {}
    problems = _in_order(model, dtype, device)
    return {name: problem for name, problem in problems.items() if problem is not None}


def _in_order(model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, str | None]:
    wanted: tuple[str, ...] = (FLASH, VARLEN, "sdpa", "eager")
    if device.type == "cpu":
        wanted = ("segments", "sdpa", "eager")
    return {name: _unusable(model, name, dtype, device) for name in wanted}


def own(model: Any) -> str:
    """Return the family's own implementation that takes masks: sdpa, or eager if it has no sdpa (Gemma 2)."""
    return "sdpa" if model._supports_sdpa else "eager"


def _unusable(model: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    if not getattr(model, _SUPPORT.get(name, ""), True):
        return f"{type(model).__name__} does not support it"
    # transformers would replace it by a kernel that it downloads from the hub, or fails to download.
    kernels = getattr(model, "_compatible_flash_implementations", None)
    if name == FLASH and kernels and FLASH not in kernels:
        return f"{type(model).__name__} supports only other kernels"
    if not needs_gpu(name):
        return None
    if device.type != "cuda":
        return "it needs a GPU"
    if name == VARLEN and not kernel():
        return f"it needs torch 2.12 or later, this is {torch.__version__}"
    if name == FLASH:
        from transformers.utils.import_utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            return "the package flash-attn is not installed"
        try:  # it is built for one version of torch, but can be installed beside any
            importlib.import_module("flash_attn.flash_attn_interface")
        except Exception as error:  # ImportError of a library, or any error of its own code
            return f"the package flash-attn does not import: {first_line(error)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it does not compute in {str(dtype).removeprefix('torch.')}; set model.dtype to bfloat16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of the Ampere generation or later"
    if name == VARLEN:
        return trial(dtype, device)
    return None


# Attention that stays inside segments: nothing is computed between segments, so nothing is masked.


# Longest segment for `_Batched`: its memory is quadratic, and beyond this length it is slower.
SHORT = 512
# Segments are padded to multiples of this, so that there are few shapes and many segments per product.
STEP = 16

# True if `_Batched` may be used.
_products: ContextVar[bool] = ContextVar("products", default=True)


def register(made: Callable[[Any], Any] = lambda function: function) -> None:
    """Register "segments" and "varlen" as attention implementations with transformers; neither takes a mask.

    `made` may wrap both functions.

    transformers makes no mask for an implementation that has no function for masks. With a function that returns None,
    it would first compare positions, and a GPU's host would wait for the result in each micro-batch.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("segments", made(with_common_beginnings(segment_attention)))
    AttentionInterface.register(VARLEN, made(with_common_beginnings(varlen_attention)))


JOINS = ("segments", VARLEN)
"""Implementations that take segments with common beginnings."""


def with_common_beginnings(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Let an attention take segments that have the rows of their first tokens in common (tokens/collate.py).

    The rows (1, H, T, D) are put together to whole segments, on which `attend` computes the same bits as if the rows
    were there twice: `whole_rows` has the row of each token of all segments, and `own_places` the place of each row
    among these tokens. The rows that two segments have in common are computed twice here, but only here.
    """

    def attended(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        whole_rows: Tensor | None = None,
        own_places: Tensor | None = None,
        **named: Any,
    ) -> tuple[Tensor, None]:
        if whole_rows is None or own_places is None:
            return attend(module, query, key, value, attention_mask, **named)  # type: ignore[no-any-return]
        q, k, v = (x.index_select(2, whole_rows) for x in (query, key, value))
        output, _ = attend(module, q, k, v, attention_mask, **named)
        return output.index_select(1, own_places), None

    return attended


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each segment.

    query (1, H, T, D), key and value (1, H', T, D); `cu_seq_lens_q` holds the segments' borders 0 = c0 < c1 < ... =
    T; the result is (1, T, H, D). Without borders a segment begins where `position_ids` (1, T) do not increase by
    one. Raise UserError for what a family asks for and this does not do, and if neither arrives: some families do not
    pass them on.
    """
    if cu_seq_lens_q is not None:
        borders = cu_seq_lens_q.tolist()
    else:
        borders = _borders(position_ids)
    lengths = [stop - start for start, stop in pairwise(borders)]
    if (
        softcap is not None
        or s_aux is not None
        or (sliding_window is not None and sliding_window < max(lengths))
    ):
        raise UserError(
            "model.attention: the model has a softcap, window or sinks; set model.attention: eager"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    batched = _products.get() and query.device.type == "cpu" and query.dtype == torch.bfloat16
    parts = []
    offset = 0
    for short, run in groupby(lengths, lambda length: batched and length <= SHORT):
        sizes = tuple(run)
        q, k, v = (x.narrow(2, offset, sum(sizes)) for x in (query, key, value))
        batch: Any = _Batched.apply if short else _fused
        parts.append(batch(q, k, v, sizes, scaling))
        offset += sum(sizes)
    if len(parts) == 1:
        return parts[0], None
    return torch.cat(parts, dim=1), None


def _borders(positions: Tensor | None) -> list[int]:
    if positions is None or len(positions) > 1:
        raise UserError(NO_BORDERS)
    starts = (positions[0].diff() != 1).nonzero().flatten() + 1
    return [0, *starts.tolist(), positions.shape[1]]


def needs_gpu(name: str) -> bool:
    return name in (FLASH, VARLEN)


def stand_in(wanted: str, dtype: torch.dtype, flat: bool) -> str:
    """Return the implementation that fake tensors run instead of the one that the workers' GPU would have.

    `flat`: the model can have all examples of a micro-batch in one row.
    """
    # The workers' GPU may be on another machine, so it is not asked. The choice follows what is installed here.
    if is_auto(wanted):
        installed = importlib.util.find_spec("flash_attn") or kernel()
        half = dtype in (torch.bfloat16, torch.float16)
        wanted = FLASH if installed and flat and half else "sdpa"
    if not needs_gpu(wanted):
        return wanted
    # Flash attention keeps the same tensors as torch's kernel for variable lengths, which fake tensors can run. Both
    # return one tensor, token by token. "segments" stands in for them in an older torch; it also keeps a copy.
    return VARLEN if kernel() else "segments"


@contextmanager
def on_fake_tensors(gpu: bool) -> Iterator[None]:
    """Prepare attention for fake tensors within the block; `gpu`: they stand for those of a GPU, but say "cpu"."""
    register()
    before = _products.set(not gpu)
    try:
        yield
    finally:
        _products.reset(before)
        # These caches hold fake tensors now, which must not reach a real model.
        _layout.cache_clear()
        _causal.cache_clear()


def _fused(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    sizes = list(lengths)
    segments = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        for q, k, v in segments
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


class _Batched(torch.autograd.Function):
    """softmax(q k^T) v by batched products over groups of segments of one padded length P.

    Rows (one token's one head) are sorted by group, segment, head and position, so that a group of g
    segments is a view (g H', G P, D) of the queries and (g H', P, D) of keys and values. Padding follows a
    segment's last token, where the causal mask hides it, and its gradient is set to zero.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        ours = _layout(lengths, query.shape[1])
        theirs = _layout(lengths, key.shape[1])
        q = ours.gather(query)
        k = theirs.gather(key)
        v = theirs.gather(value)
        # Heads of values may have another size (DeepSeek).
        out = q.new_empty(q.shape[0], v.shape[1])
        saved = []
        for q_, k_, v_, out_ in _blocks(theirs, q, k, v, out):
            mask = _causal(k_.shape[1], ours.heads // theirs.heads, q.device)
            scores = torch.baddbmm(mask, q_.float(), k_.float().transpose(1, 2), alpha=scale)
            saved.append(torch.softmax(scores, dim=-1).to(q.dtype))
            torch.bmm(saved[-1], v_, out=out_)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.ours = ours
        ctx.theirs = theirs
        ctx.scale = scale
        return ours.scatter(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        ours = ctx.ours
        theirs = ctx.theirs
        g = ours.gather(grads[0].transpose(1, 2)).index_fill_(0, ours.padding, 0)
        dq = torch.empty_like(q)
        dk = torch.empty_like(k)
        dv = torch.empty_like(v)
        blocks = _blocks(theirs, q, k, v, g, dq, dk, dv)
        for weights, (q_, k_, v_, g_, dq_, dk_, dv_) in zip(saved, blocks, strict=True):
            torch.bmm(weights.transpose(1, 2), g_, out=dv_)
            p = weights.float()
            dp = torch.bmm(g_.float(), v_.float().transpose(1, 2))
            dp -= (dp * p).sum(-1, keepdim=True)
            ds = dp.mul_(p).mul_(ctx.scale).to(q.dtype)
            torch.bmm(ds, k_, out=dq_)
            torch.bmm(ds.transpose(1, 2), q_, out=dk_)
        back = (ours.scatter(dq), theirs.scatter(dk), theirs.scatter(dv))
        return *(x.transpose(1, 2) for x in back), None, None


@dataclass(frozen=True)
class _Layout:
    """The order of rows of (1, H, T, D) in their groups; `groups` holds (segments, padded length)."""

    groups: tuple[tuple[int, int], ...]
    heads: int
    source: Tensor
    """For each row of the groups its row in the flat order (token, head); padding repeats the last token."""
    target: Tensor
    """For each row of the flat order its row in the groups."""
    padding: Tensor
    """Rows of the groups that are padding."""

    def gather(self, x: Tensor) -> Tensor:
        """(1, H, T, D) -> rows of the groups."""
        return x.transpose(1, 2).reshape(-1, x.shape[-1]).index_select(0, self.source)

    def scatter(self, rows: Tensor) -> Tensor:
        """Rows of the groups -> (1, T, H, D)."""
        return rows.index_select(0, self.target).view(1, -1, self.heads, rows.shape[-1])


@lru_cache(maxsize=8)  # all layers of a model ask for the same
def _layout(lengths: tuple[int, ...], heads: int) -> _Layout:
    starts = np.cumsum((0, *lengths))
    padded = [-(-length // STEP) * STEP for length in lengths]
    by_size = sorted(range(len(lengths)), key=lambda i: padded[i])
    head = np.arange(heads)[:, None]
    source = []
    padding = []
    base = 0
    target = np.empty((sum(lengths), heads), dtype=np.int64)
    for i in by_size:
        position = np.arange(padded[i])
        row = base + head * padded[i] + position
        source.append((starts[i] + np.minimum(position, lengths[i] - 1)) * heads + head)
        target[starts[i] : starts[i + 1]] = row[:, : lengths[i]].T
        padding.append(row[:, lengths[i] :])
        base += row.size
    return _Layout(
        groups=tuple((len(list(same)), size) for size, same in groupby(sorted(padded))),
        heads=heads,
        source=_flat(source),
        target=_flat([target]),
        padding=_flat(padding),
    )


def _flat(parts: "list[np.ndarray[Any, np.dtype[np.int64]]]") -> Tensor:
    return torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]))


def _blocks(keys: _Layout, *tensors: Tensor) -> "list[tuple[Tensor, ...]]":
    tokens = [count * size for count, size in keys.groups]
    total = sum(tokens)
    parts = []
    for x in tensors:
        per_token = len(x) // total
        parts.append(x.split([count * per_token for count in tokens]))
    blocks = []
    for (count, _), *group in zip(keys.groups, *parts, strict=True):
        heads = count * keys.heads
        blocks.append(tuple(x.view(heads, -1, x.shape[-1]) for x in group))
    return blocks


@lru_cache(maxsize=64)
def _causal(size: int, ways: int, device: torch.device) -> Tensor:
    return torch.full((size, size), float("-inf"), device=device).triu(1).repeat(ways, 1)
