"""Triton kernels of the parts of a block (train/parts.py); importing this module needs Triton.

Each reads its inputs once, computes in float32, and rounds where the families' code rounds. All tensors are contiguous,
and of one precision but for `r`, which is float32. `n` is the length of a row, or the size of all; a program computes
one row of `n`, or BLOCK numbers.
"""

import triton
import triton.language as tl


@triton.jit
def _read(pointer, place, inside):
    return tl.load(pointer + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rounded(number, like):
    return number.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def rms_norm(x, weight, y, r, eps, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    wide = _read(x, row * n + column, inside)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / n + eps)
    tl.store(r + row, scale)
    normed = _rounded(wide * scale, y) * _read(weight, column, inside)
    tl.store(y + row * n + column, normed, mask=inside)


@triton.jit
def rms_norm_backward(grad, x, weight, r, grad_x, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    place = row * n + column
    slope = _rounded(_read(grad, place, inside) * _read(weight, column, inside), x)
    wide = _read(x, place, inside)
    scale = tl.load(r + row)
    total = tl.sum(slope * wide, 0) * scale * scale * scale / n
    tl.store(grad_x + place, slope * scale - wide * total, mask=inside)


@triton.jit
def swiglu(gate, up, product, n, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    wide = _read(gate, place, inside)
    active = _rounded(wide / (1.0 + tl.exp(-wide)), product)
    tl.store(product + place, active * _read(up, place, inside), mask=inside)


@triton.jit
def swiglu_backward(grad, gate, up, grad_gate, grad_up, n, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    slope = _read(grad, place, inside)
    wide = _read(gate, place, inside)
    share = 1.0 / (1.0 + tl.exp(-wide))
    tl.store(grad_up + place, slope * _rounded(wide * share, gate), mask=inside)
    of_active = _rounded(slope * _read(up, place, inside), gate)
    of_gate = of_active * share * (1.0 + wide * (1.0 - share))
    tl.store(grad_gate + place, of_gate, mask=inside)


@triton.jit
def rotate(x, cos, sin, y, heads, size, n, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Compute each number from itself and the one half a head further or before; BACK is the transpose."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    column = place % size
    angle = place // (size * heads) * size + column
    left = column < size // 2
    step = tl.where(left, size // 2, -(size // 2))
    sine = _read(sin, angle + step if BACK else angle, inside)
    other = _rounded(_read(x, place + step, inside) * sine, y)
    turned = tl.where(left == BACK, other, -other)
    own = _rounded(_read(x, place, inside) * _read(cos, angle, inside), y)
    tl.store(y + place, own + turned, mask=inside)
