"""Adapted weights: a frozen layer plus a low-rank path in delta form (see adapter/factors.py).

Shapes: x is (..., n), y is (..., m), T the product of the leading dimensions, k = 2r with B0, else r.

    down = [A0; dA]  (k x n)        up = [dB, B0 + dB]  (m x k)        y = base(x) + s up (down x)

Layers of their own are here; weights that the experts of a mixture share are in adapter/experts.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.model.quantised import QuantisedLinear

# Factors of an adapter: its frozen start, its trained change, and the weights that follow from both.


@dataclass(frozen=True)
class Factors:
    """The frozen start of one layer's adapter, or of a stack's, in float32."""

    a0: Tensor
    """(E x) r x n."""
    b0: Tensor | None
    """(E x) m x r; None stands for zeros."""
    full_rank: bool = True
    """False if the slice of the weight that the factors come from was rank-deficient, for any expert of a stack."""

    @property
    def rank(self) -> int:
        """r of this layer; of a stack, each expert's. Layers may differ."""
        return int(self.a0.shape[-2])


@dataclass(frozen=True)
class AdapterWeights:
    """One layer's adapter as trained, or a stack's, in float32."""

    factors: Factors
    da: Tensor
    """(E x) r x n."""
    db: Tensor
    """(E x) m x r."""

    def delta(self, scale: float) -> Tensor:
        """The change of the weight, (E x) m x n, in float32."""
        a0, b0 = self.factors.a0, self.factors.b0
        b = self.db if b0 is None else b0 + self.db
        return scale * (self.db @ a0 + b @ self.da)

    def plain_rank(self) -> int:
        """The rank of `plain_lora`: 2r with B0, r without."""
        return self.factors.rank * (1 if self.factors.b0 is None else 2)

    def plain_lora(self) -> tuple[Tensor, Tensor]:
        """(lora_A, lora_B) of an ordinary LoRA with the same product on the untouched base.

        Rank 2r with B0: lora_A = [A0; dA], lora_B = [dB, B0 + dB]; rank r without.
        """
        a0, b0 = self.factors.a0, self.factors.b0
        if b0 is None:
            return a0 + self.da, self.db
        return torch.cat([a0, self.da], dim=-2), torch.cat([self.db, b0 + self.db], dim=-1)


def joined(da: Tensor, db: Tensor, a0: Tensor, b0: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(down, up) of one weight: taken in float32, rounded once to `dtype`."""
    if b0 is None:
        down, up = a0 + da, db
    else:
        down, up = torch.cat([a0, da]), torch.cat([db, b0 + db], dim=1)
    return down.to(dtype), up.to(dtype)


class _LowRank(torch.autograd.Function):
    """y += s up (down x), with gradients for x, dA and dB only; down and up are those of dA and dB.

    One node instead of a dozen: the frozen halves of `down` and `up` get no gradient products.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, da: Tensor, db: Tensor, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        hidden = x.reshape(-1, x.shape[-1]) @ down.T
        y.view(-1, y.shape[-1]).addmm_(hidden, up.T, alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, hidden, down, up)
        ctx.scale, ctx.rank = scale, da.shape[0]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, hidden, down, up = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        grad_hidden = (g @ up) * ctx.scale
        grad_x = (grad_hidden @ down).view(x.shape) if ctx.needs_input_grad[1] else None
        if len(down) > ctx.rank:
            grad_hidden = grad_hidden[:, ctx.rank :]
            hidden = hidden[:, : ctx.rank] + hidden[:, ctx.rank :]
        grad_da = grad_hidden.T @ x.reshape(-1, x.shape[-1])
        grad_db = (g.T @ hidden).float() * ctx.scale
        return grad, grad_x, grad_da.float(), grad_db, None, None, None


def add_low_rank(y: Tensor, x: Tensor, da: Tensor, db: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """y (..., m) plus s up (down x) for x (..., n), in place; down and up as `joined` makes them of da and db."""
    low_rank: Any = _LowRank  # torch leaves `apply` untyped
    result: Tensor = low_rank.apply(y, x, da, db, down, up, scale)
    return result


class AdaptedWeight(nn.Module):
    """What adapts one weight, or the weights of all experts of a mixture: frozen factors, and their change.

    `da` and `db` are the trainable parameters, float32, zero at the start, so that the first output
    equals the base's exactly in every precision. Shapes as in adapter/factors.py.

    Whoever sets `training` says that dA and dB stand still until it is set again, as they do while a step adds up the
    gradients of its micro-batches: down and up are made once in that time. Versions of tensors do not tell by
    themselves: an optimizer that works on one vector of all dA and dB (train/optim.py) leaves theirs as they were.
    """

    a0: Tensor
    b0: Tensor | None

    def __init__(self, factors: Factors, m: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.full_rank = factors.full_rank
        # Memory of their own: factors are views of the buffer in which they were exchanged.
        self.register_buffer("a0", factors.a0.clone(), persistent=False)
        self.register_buffer("b0", None if factors.b0 is None else factors.b0.clone(), persistent=False)
        *experts, rank, _ = factors.a0.shape
        self.da = nn.Parameter(torch.zeros_like(factors.a0))
        self.db = nn.Parameter(factors.a0.new_zeros(*experts, m, rank))
        self._stand_still = False

    @property
    def training(self) -> bool:
        """Whether adapters train: with dropout, and with dA and dB that stand still since it was set."""
        return self._training

    @training.setter
    def training(self, on: bool) -> None:
        self._training = self._stand_still = on
        self._made: dict[object, tuple[Tensor, Tensor]] = {}

    def joined(self, dtype: torch.dtype, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """(down, up) of the weight, or of one expert's, in `dtype`; they must not be changed."""
        if not self._stand_still:
            return self._join(dtype, expert)
        # With its versions: a parameter that is changed itself, against the promise, is still seen as it is.
        key = (dtype, expert, self.da.device, self.da._version, self.db._version)
        if key not in self._made:
            self._made[key] = self._join(dtype, expert)
        return self._made[key]

    @torch.no_grad()
    def _join(self, dtype: torch.dtype, expert: int | None = None) -> tuple[Tensor, Tensor]:
        def part(whole: Tensor) -> Tensor:
            return whole if expert is None else whole[expert]

        b0 = None if self.b0 is None else part(self.b0)
        return joined(part(self.da), part(self.db), part(self.a0), b0, dtype)

    def dropped_out(self, x: Tensor) -> Tensor:
        """What the low-rank path sees of x: dropout, while it trains."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def weights(self) -> AdapterWeights:
        """The adapter as it is now, detached."""
        return AdapterWeights(Factors(self.a0, self.b0, self.full_rank), self.da.detach(), self.db.detach())


@dataclass(frozen=True)
class WeightFacts:
    """What code may ask of an adapted layer's weight without using it; a product with it is a TypeError."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class AdaptedLinear(AdaptedWeight):
    """`base` (a linear layer, left as it is) plus a trainable low-rank path."""

    def __init__(self, base: nn.Module, factors: Factors, scale: float, dropout: float = 0.0) -> None:
        super().__init__(factors, out_features(base), scale, dropout)
        self.base = base

    @property
    def weight(self) -> WeightFacts:
        """Facts alone: whoever multiplies with the weight itself would pass the adapter by."""
        return weight_facts(self.base)

    @property
    def bias(self) -> Tensor | None:
        """The base's, which no adapter changes."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> y (..., m)."""
        y: Tensor = self.base(x)
        if not _makes_its_output(self.base):
            y = y.clone()  # it may be a view, or memory that the layer keeps
        inner = self.dropped_out(x)
        return add_low_rank(y, inner, self.da, self.db, *self.joined(inner.dtype), self.scale)


def _makes_its_output(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, QuantisedLinear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module keeps its weight as n x m (GPT-2's Conv1D) instead of m x n."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer by its class."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def weight_facts(module: nn.Module) -> WeightFacts:
    """Of a linear module's weight, as it is stored; a packed one is not unpacked for it."""
    if isinstance(module, QuantisedLinear):
        shape = torch.Size((module.out_features, module.in_features))
        return WeightFacts(shape, module.dtype, module.codes.device)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return WeightFacts(weight.shape, weight.dtype, weight.device)


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight of a linear module as m x n (out x in features), a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_transposed(module) else weight.detach()


def out_features(module: nn.Module) -> int:
    """m of a linear module, also of one whose weight is packed."""
    return int(module.out_features) if isinstance(module, nn.Linear) else int(weight_matrix(module).shape[0])
