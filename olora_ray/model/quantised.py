"""Linear layers whose weight is kept packed, in 4 or 8 bits per number, and unpacked for each product.

    W (m x n)  ->  codes, scales  ->  W' (m x n, in the model's precision)        y = W' x + b

Everything that uses such a layer computes with W': the forward pass, the backward pass, and readers of its weight.

    nf4    the 16 codes of QLoRA (arXiv 2305.14314, section 3), a float32 scale per 64 numbers    4.5 bits per number
    int8   -127 ... 127, a float32 scale per row                                                  8 bits
    fp8    float8 e4m3, a float32 scale per row                                                   8 bits

nf4 and int8 are bitsandbytes' formats, packed here by torch, on the device: its bytes are the same on each, since only
exact operations and single roundings are used. fp8 is a type of torch.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.common.errors import UserError

# Numbers of a weight, row after row, that share a scale in nf4.
BLOCK = 64
# Numbers that are packed at once, because packing takes several times their memory. Rows are taken by the block, so
# that each scale sees the same numbers as if the whole weight were packed at once.
AT_ONCE = 2**20
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max

# Codes and scales.
Packed = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kind:
    pack: Callable[[Tensor], Packed]
    """A weight (m x n, float32) -> its codes and scales; parts of whole blocks of rows may be joined."""
    unpack: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]
    """(codes, scales, (m, n), precision) -> the weight."""
    size: Callable[[int, int], int]
    """(m, n) -> bytes of codes and scales."""
    unpacking: Callable[[int], int]
    """Bytes per number of the model's precision -> bytes per number that unpacking takes at its peak, with the
    result."""
    library: str | None = None
    """The package that it needs."""


# The codes of nf4: bitsandbytes.functional.get_4bit_type("nf4").
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)


def _nf4(weight: Tensor) -> Packed:
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / scales.clamp(min=1e-38))[:, None]).flatten()[: weight.numel()]
    codes = torch.tensor(NF4, device=weight.device)
    # Counting the borders below a number is ten times as fast as a search, on CPUs with numpy's comparison.
    nearest = torch.zeros_like(scaled, dtype=torch.uint8)
    for border in ((codes[:-1] + codes[1:]) / 2).unbind():
        if scaled.device.type == "cpu":
            above = torch.from_numpy(scaled.numpy() > border.numpy())
        else:
            above = scaled > border
        nearest += above.view(torch.uint8)
    return (nearest[::2] << 4 | nearest[1::2])[:, None], scales


def _from_nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    library = _functional()
    count = shape.numel()
    # On CPUs bitsandbytes (0.50) begins a new block with each row when it unpacks, but not when it packs. So the weight
    # is unpacked as rows of one block, or as a single row.
    rows = torch.Size((1, count))
    if count % BLOCK == 0:
        rows = torch.Size((count // BLOCK, BLOCK))
    state = library.QuantState(
        absmax=scales, shape=rows, dtype=dtype, blocksize=BLOCK, quant_type="nf4"
    )
    weight: Tensor = library.dequantize_4bit(codes, state)
    return weight.view(shape)


def _int8(weight: Tensor) -> Packed:
    scales = weight.abs().amax(dim=1)
    return torch.round(weight * (127.0 / scales.clamp(min=1e-30)[:, None])).to(torch.int8), scales


def _fp8(weight: Tensor) -> Packed:
    # A row of zeros has the scale 0, by which nothing can be divided.
    scales = (weight.abs().amax(dim=1) / LARGEST_FP8).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight / scales[:, None]).to(torch.float8_e4m3fn), scales


def _by_rows(m: int, n: int) -> int:
    return m * n + 4 * m


# By the values of `model.quantization`.
KINDS = {
    "nf4": Kind(
        _nf4,
        _from_nf4,
        lambda m, n: -(-m * n // 2) + 4 * -(-m * n // BLOCK),
        lambda width: width,
        "bitsandbytes",
    ),
    "int8": Kind(
        _int8,
        lambda codes, scales, shape, dtype: (
            _functional().int8_vectorwise_dequant(codes, scales).to(dtype)
        ),
        _by_rows,
        lambda width: 8,
        "bitsandbytes",
    ),
    "fp8": Kind(
        _fp8,
        lambda codes, scales, shape, dtype: codes.float().mul_(scales[:, None]).to(dtype),
        _by_rows,
        lambda width: 4 if width == 4 else 4 + width,
    ),
}


def require(kind: str) -> None:
    """Raise UserError if the package for this quantization is not installed; it is not imported."""
    library = KINDS[kind].library
    if library is not None and importlib.util.find_spec(library) is None:
        raise UserError(
            f"model.quantization: {kind} needs {library}, which is not installed; pip install 'olora-ray[quant]' on all"
            " nodes, or set it to fp8"
        )


def _functional() -> Any:
    # Imported only when a weight is packed, because that takes seconds.
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns about a kernel for inference that is not used here
    try:
        import bitsandbytes.functional as functional
    finally:
        logger.setLevel(before)
    return functional


def pack(weight: Tensor, kind: str, device: torch.device | None = None) -> Packed:
    """Return codes and scales of a weight (m x n), computed on `device` (by default the weight's) and left there."""
    rows = BLOCK * max(1, AT_ONCE // (BLOCK * max(1, weight.shape[1])))
    parts = [
        KINDS[kind].pack(part.to(device).float().contiguous())
        for part in weight.detach().split(rows)
    ]
    if len(parts) == 1:
        return parts[0]
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)


class QuantisedLinear(nn.Linear):
    """A frozen linear layer with a packed weight; `weight` is unpacked at each access."""

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        kind: str,
        device: torch.device | None = None,
        packed: Packed | None = None,
    ) -> None:
        """Pack a weight (m x n) for `device`; the layer computes in the weight's precision.

        If it is `packed` already, the numbers of `weight` are not read.
        """
        nn.Module.__init__(self)  # not Linear's, which would create a weight
        self.out_features, self.in_features = weight.shape
        self.kind = kind
        self.dtype = weight.dtype
        codes, scales = packed or pack(weight, kind, device)
        self.register_buffer("codes", codes.to(device), persistent=False)
        self.register_buffer("scales", scales.to(device), persistent=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # of Linear it can be set
        """W' (m x n) in the precision of the model, in new memory."""
        shape = torch.Size((self.out_features, self.in_features))
        return KINDS[self.kind].unpack(self.codes, self.scales, shape, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., n) -> y (..., m)."""
        product: Any = _Product  # torch leaves `apply` untyped
        y: Tensor = product.apply(input.reshape(-1, self.in_features), self)
        return y.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """y (T x m) = W' x + b of x (T x n), with a gradient for x only.

    The backward pass unpacks W' again, because autograd would keep it in memory. With more dimensions torch would
    return a view, to which nothing may be added in place (adapter/layer.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.weight, None
