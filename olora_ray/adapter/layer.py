"""Adapted weights: a frozen layer plus a low-rank path in delta form (A0 and B0 are frozen, dA and dB are trained).

Shapes: x is (..., n), y is (..., m), T the product of the leading dimensions, k = 2r with B0, else r.

    down = [A0; dA]  (k x n)        up = [dB, B0 + dB]  (m x k)        y = base(x) + s up (down x)

The first part adapts linear layers, the second the weights that all experts of a mixture share.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.model.quantised import QuantisedLinear

# Factors of an adapter: its frozen start, its trained change, and the weights computed from both.


@dataclass(frozen=True)
class Factors:
    """The frozen start of the adapter of one layer or stack, in float32."""

    a0: Tensor
    """(E x) r x n."""
    b0: Tensor | None
    """(E x) m x r; None means zeros."""
    full_rank: bool = True
    """False if the slice of the weight that determines the factors is rank-deficient, for any expert of a stack."""

    @property
    def rank(self) -> int:
        """r of this layer, or of each expert of this stack; layers may differ."""
        return int(self.a0.shape[-2])

    def on_cpu(self) -> "Factors":
        return Factors(self.a0.cpu(), None if self.b0 is None else self.b0.cpu(), self.full_rank)


@dataclass(frozen=True)
class AdapterWeights:
    """The trained adapter of one layer or stack, in float32."""

    factors: Factors
    da: Tensor
    """(E x) r x n."""
    db: Tensor
    """(E x) m x r."""

    def delta(self, scale: float) -> Tensor:
        """Return the change of the weight, (E x) m x n, in float32."""
        b0 = self.factors.b0
        b = self.db if b0 is None else b0 + self.db
        return scale * (self.db @ self.factors.a0 + b @ self.da)

    def shrunk(self, start: "AdapterWeights | None", factor: float) -> "AdapterWeights":
        """Return the weights with `factor` times their change since `start` (None: since dA = dB = 0)."""
        if start is None:
            return replace(self, da=factor * self.da, db=factor * self.db)
        da = torch.lerp(start.da, self.da, factor)
        db = torch.lerp(start.db, self.db, factor)
        return replace(self, da=da, db=db)

    def plain_rank(self) -> int:
        return self.factors.rank * (1 if self.factors.b0 is None else 2)

    def plain_lora(self) -> tuple[Tensor, Tensor]:
        """Return (lora_A, lora_B) of an ordinary LoRA on the unchanged base, with the same product.

        With B0 the rank is 2r: lora_A = [A0; dA], lora_B = [dB, B0 + dB]; without B0 it is r.
        """
        return joined(self.da, self.db, self.factors.a0, self.factors.b0, self.da.dtype)


def joined(
    da: Tensor, db: Tensor, a0: Tensor, b0: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (down, up) of one weight: computed in float32, rounded once to `dtype`."""
    if b0 is None:
        return (a0 + da).to(dtype), db.to(dtype)
    down = torch.cat([a0, da], dim=-2)
    up = torch.cat([db, b0 + db], dim=-1)
    return down.to(dtype), up.to(dtype)


class _Adapted(torch.autograd.Function):
    """y = W x + b + s up (down x), with gradients for x, dA and dB only.

    x gets one gradient, to which both products are added in place. The frozen halves of `down` and `up` need no
    gradient products. With `sums`, the gradients of dA and dB are added to `grad` here, if there is one.

    x and `inner` differ in two cases: with dropout `inner` is a copy of x, and if the base has computed its `y` itself
    there is no x. y comes first, because autograd expects it there if it is a view.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Any,
        x: Any,
        inner: Any,
        base: Any,
        down: Tensor,
        up: Tensor,
        scale: float,
        sums: bool,
        da: Tensor,
        db: Tensor,
    ) -> Tensor:
        entered: Tensor = x if inner is None else inner
        hidden = entered.reshape(-1, down.shape[1]) @ down.T
        if y is None:
            # Detached, because an output that is a view could not be changed in place.
            output = F.linear(x, base.weight, base.bias).detach()
        else:
            output = y
            ctx.mark_dirty(y)
        output.view(-1, len(up)).addmm_(hidden, up.T, alpha=scale)
        ctx.save_for_backward(entered, hidden, down, up)
        # The base's weight is not saved, because it may be sharded or packed until the backward pass needs it.
        ctx.base = base
        ctx.scale = scale
        ctx.rank = len(da)
        ctx.sums = (da, db) if sums else ()
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        entered, hidden, down, up = ctx.saved_tensors
        rank = ctx.rank
        grad = grads[0].reshape(-1, len(up))
        # `hidden` has two halves, which belong to A0 and to dA, or one, which belongs to A0 + dA.
        of_db = hidden
        if len(down) > rank:
            of_db = hidden[:, :rank] + hidden[:, rank:]
        # With beta=0 the numbers that the new memory holds do not count.
        grad_hidden = torch.empty_like(hidden).addmm_(grad, up, beta=0, alpha=ctx.scale)
        grad_db = up.new_empty(len(up), rank).addmm_(grad.T, of_db, beta=0, alpha=ctx.scale)
        grad_da = grad_hidden[:, -rank:].T @ entered.reshape(-1, down.shape[1])
        grad_x = grad_inner = None
        if ctx.needs_input_grad[1]:
            grad_x = grad @ ctx.base.weight.to(grad.dtype)  # they differ under autocast
        if ctx.needs_input_grad[2]:
            grad_inner = (grad_hidden @ down).view(entered.shape)
        elif grad_x is not None:
            grad_x.addmm_(grad_hidden, down)
        if grad_x is not None:
            grad_x = grad_x.view(entered.shape)
        grad_y = grads[0] if ctx.needs_input_grad[0] else None
        trained: list[Tensor | None] = [grad_da, grad_db]
        for number, parameter in enumerate(ctx.sums):
            # Autograd adds what is returned, after a conversion to float32.
            if parameter.grad is not None and not parameter._backward_hooks:
                parameter.grad.add_(trained[number])
                trained[number] = None
        return grad_y, grad_x, grad_inner, None, None, None, None, None, *trained


def add_low_rank(
    y: Tensor, x: Tensor, da: Tensor, db: Tensor, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """Add s up (down x) to y (..., m), in place, for x (..., n); `joined` computes down and up from da and db."""
    adapted: Any = _Adapted  # torch leaves `apply` untyped
    result: Tensor = adapted.apply(y, None, x, None, down, up, scale, False, da, db)
    return result


class AdaptedWeight(nn.Module):
    """The adapter of one weight, or of a stack: frozen factors, and their trainable change.

    `da` and `db` are the trainable parameters, float32, zero at the start, so that the first output equals the base's
    exactly in every precision. Shapes as in `Factors`.

    With `whole_steps`, whoever sets `training` promises that dA and dB stay the same until it is set again. They do
    while a step sums the gradients of its micro-batches, so down and up are computed once per step. After it was set to
    true, a backward pass adds the gradients to `grad` itself, if there is one, so that torch.autograd.grad does not
    return them.
    """

    a0: Tensor
    b0: Tensor | None
    whole_steps = True
    """False in a foreign loop, which sets `training` once for many steps, and whose hooks wait for gradients."""

    def __init__(self, factors: Factors, m: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.full_rank = factors.full_rank
        self.register_buffer("a0", factors.a0, persistent=False)
        self.register_buffer("b0", factors.b0, persistent=False)
        *experts, rank, _ = factors.a0.shape
        self.da = nn.Parameter(torch.zeros_like(factors.a0))
        self.db = nn.Parameter(factors.a0.new_zeros(*experts, m, rank))
        self._stand_still = False

    @property
    def training(self) -> bool:
        """True if dropout applies. Setting it starts a time in which dA and dB stay the same."""
        return self._training

    @training.setter
    def training(self, on: bool) -> None:
        self._training = on
        self._stand_still = on and self.whole_steps
        self._made: dict[object, tuple[Tensor, Tensor]] = {}

    def joined(self, dtype: torch.dtype, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (down, up) of the weight, or of one expert, in `dtype`; the caller must not change them."""
        if not self._stand_still:
            return self._join(dtype, expert)
        # The versions show a change of the parameters themselves, against the promise. They do not show the
        # optimizer's: it changes one vector that holds all dA and dB (adapter/optimizers/).
        key = (dtype, expert, self.da.device, self.da._version, self.db._version)
        if key not in self._made:
            self._made[key] = self._join(dtype, expert)
        return self._made[key]

    @torch.no_grad()
    def _join(self, dtype: torch.dtype, expert: int | None = None) -> tuple[Tensor, Tensor]:
        if expert is None:
            return joined(self.da, self.db, self.a0, self.b0, dtype)
        b0 = None if self.b0 is None else self.b0[expert]
        return joined(self.da[expert], self.db[expert], self.a0[expert], b0, dtype)

    def dropped_out(self, x: Tensor) -> Tensor:
        if self.training and self.dropout:
            return F.dropout(x, self.dropout)
        return x

    def weights(self) -> AdapterWeights:
        factors = Factors(self.a0, self.b0, self.full_rank)
        return AdapterWeights(factors, self.da.detach(), self.db.detach())


class TakenWeight(NotImplementedError, AttributeError):
    """A model's code uses the weight of an adapted layer so that the adapter would have no effect."""


@dataclass(frozen=True)
class WeightFacts:
    """Shape, precision and device of an adapted layer's weight; any other use of it raises TakenWeight."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layer: str = "a layer"

    def __getattr__(self, name: str) -> Any:
        raise TakenWeight(
            f"{self.layer}: adapters do not support .weight.{name}, which the model's code uses"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        # torch calls this for its functions that get this object: "Extending torch with a Tensor-like type".
        facts = next(
            arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, WeightFacts)
        )
        name = getattr(func, "__name__", func)
        raise TakenWeight(
            f"{facts.layer}: adapters do not support {name} of a weight, which the model's code uses"
        )


class AdaptedLinear(AdaptedWeight):
    def __init__(
        self,
        base: nn.Module,
        factors: Factors,
        scale: float,
        dropout: float = 0.0,
        name: str = "a layer",
    ) -> None:
        super().__init__(factors, out_features(base), scale, dropout)
        self.base = base
        self.name = name

    @property
    def weight(self) -> WeightFacts:
        # Facts alone: model code that multiplies with the weight itself would silently leave out the adapter.
        return replace(weight_facts(self.base), layer=self.name)

    @property
    def bias(self) -> Tensor | None:
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropped_out(x)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # The base's product comes in this precision, and the low-rank path is added to it in place.
            inner = inner.to(torch.get_autocast_dtype(device))
        down, up = self.joined(inner.dtype)
        known = type(self.base) in (nn.Linear, QuantisedLinear)
        if known and not any(part.requires_grad for part in self.base.parameters()):
            dropped = None if inner is x else inner
            adapted: Any = _Adapted  # torch leaves `apply` untyped
            sums = self._stand_still
            y: Tensor = adapted.apply(
                None, x, dropped, self.base, down, up, self.scale, sums, self.da, self.db
            )
            return y
        # A base of another class, or one that is trained, computes its product itself.
        y = self.base(x)
        if not (type(self.base) is nn.Linear or is_transposed(self.base)):
            y = y.clone()  # it may be a view, or memory that the layer keeps
        return add_low_rank(y, inner, self.da, self.db, down, up, self.scale)

    def plainly(self, x: Tensor) -> Tensor:
        """Compute `forward` without dropout, with torch's own backward pass: the self-test compares with it."""
        a0, da, db = (part.to(x.dtype) for part in (self.a0, self.da, self.db))
        b = db if self.b0 is None else self.b0.to(x.dtype) + db
        low: Tensor = (x @ a0.T) @ db.T + (x @ da.T) @ b.T
        return self.base(x) + self.scale * low  # type: ignore[no-any-return]


def is_transposed(module: nn.Module) -> bool:
    """True if the module stores its weight as n x m (GPT-2's Conv1D) instead of m x n."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def weight_facts(module: nn.Module) -> WeightFacts:
    """Return the facts about a linear module's stored weight, without unpacking a packed one."""
    if isinstance(module, QuantisedLinear):
        shape = torch.Size((module.out_features, module.in_features))
        return WeightFacts(shape, module.dtype, module.codes.device)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return WeightFacts(weight.shape, weight.dtype, weight.device)


def out_features(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return int(module.out_features)
    return int(weight_facts(module).shape[1])


# Adapters for the experts of a mixture whose weights are one parameter: E x m x n, or E x n x m.
#
# The module's code multiplies with such a parameter in one of three ways: expert by expert in a loop, all experts at
# once over rows that are sorted by expert, or with one expert's weight for each row (transformers' "eager",
# "grouped_mm" and "batched_mm"; it switches to the last by itself when it generates on a GPU). The module stays
# unchanged. While it runs, a stand-in replaces the parameter. The stand-in supports products only: torch computes the
# base's own product with the parameter itself, and the stand-in adds the low-rank path to the result. Every other use
# raises TakenWeight. So the first output equals the base's exactly in each of the three ways, biases, gates and norms
# are the base's, and no code can silently leave out the adapter.
#
# Each expert has the low-rank path of a linear layer with the expert's own factors. The rows of a product are the
# tokens that the router sent to the expert.


class AdaptedStack(AdaptedWeight):
    """The adapters of all experts: da is E x r x n, db is E x m x r. AdaptedExperts computes with them."""

    def __init__(
        self, factors: Factors, m: int, stored_transposed: bool, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(factors, m, scale, dropout)
        self.stored_transposed = stored_transposed


class AdaptedExperts(nn.Module):
    """The module of a mixture's experts, `base`, whose parameters named in `stacks` are adapted."""

    def __init__(self, base: nn.Module, stacks: Mapping[str, AdaptedStack]) -> None:
        super().__init__()
        self.base = base
        self.adapted = list(stacks)
        for name, stack in stacks.items():
            self.add_module(name, stack)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        stand_ins = {
            name: _Stack(
                getattr(self.base, name),
                self.get_submodule(name),
                f"{type(self.base).__name__}.{name}",
            )
            for name in self.adapted
        }
        # Attributes in the module's own __dict__ hide its parameters, which stay registered.
        self.base.__dict__.update(stand_ins)
        try:
            return self.base(*inputs, **named)
        finally:
            for name in stand_ins:
                del self.base.__dict__[name]


class _StandIn:
    """A stand-in for a weight, which torch's functions accept as a tensor; `_TRANSPOSED` has its products."""

    def __init__(self, weight: Tensor, stack: Any, name: str, *, transposed: bool) -> None:
        self.weight = weight
        self.stack = stack
        self.name = name
        self.transposed = transposed
        """True if the product gets it as (E x) n x m."""
        self.shape = weight.shape
        self.dtype = weight.dtype
        self.device = weight.device

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        # torch calls this for its functions that get this object: "Extending torch with a Tensor-like type".
        stand_ins = [arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, _StandIn)]
        weight: Any = stand_ins[0]
        named = kwargs or {}
        position = next((index for index, arg in enumerate(args[:2]) if arg is weight), None)
        product = (type(weight), getattr(func, "__name__", ""), position)
        if product not in _TRANSPOSED or position is None or len(stand_ins) > 1 or len(args) < 2:
            raise TakenWeight(f"{weight.name}: adapters do not support {func} of experts' weights")
        if weight.transposed != _TRANSPOSED[product]:
            raise TakenWeight(
                f"{weight.name}: adapters do not support this product with a transpose"
            )
        y = func(*(weight.weight if arg is weight else arg for arg in args), **named)
        result: Tensor = weight.add(y, args[1 - position], named)
        return result

    def size(self, dim: int | None = None) -> Any:
        return self.weight.size(dim)

    def data_ptr(self) -> int:
        # transformers checks the alignment of this address. It is no real one, so no kernel can read past the adapter.
        return self.weight.data_ptr() % 16


class _Expert(_StandIn):
    def __init__(self, whole: "_Stack", expert: int) -> None:
        super().__init__(whole.weight[expert], whole.stack, whole.name, transposed=whole.transposed)
        self.da, self.db = whole.trained(expert)
        self.expert = expert

    def add(self, y: Tensor, x: Tensor, named: Mapping[str, Any]) -> Tensor:
        """Add the low-rank path to the product y, for x (T x n)."""
        inner = self.stack.dropped_out(x).to(y.dtype)
        down, up = self.stack.joined(inner.dtype, self.expert)
        return add_low_rank(y, inner, self.da, self.db, down, up, self.stack.scale)


class _Stack(_StandIn):
    def __init__(self, weight: Tensor, stack: Any, name: str) -> None:
        super().__init__(weight, stack, name, transposed=stack.stored_transposed)
        self._pieces: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None

    def __getitem__(self, index: Any) -> "_Expert | _Gathered":
        if isinstance(index, Tensor) and index.dim() == 1 and index.dtype == torch.int64:
            return _Gathered(self, index)
        return _Expert(self, int(index))

    def trained(self, expert: int) -> tuple[Tensor, Tensor]:
        # Cut once for all experts, so that autograd makes one gradient of the whole tensor and not E of that size.
        if self._pieces is None:
            self._pieces = (self.stack.da.unbind(0), self.stack.db.unbind(0))
        return self._pieces[0][expert], self._pieces[1][expert]

    def transpose(self, dim0: int, dim1: int) -> "_Stack":
        assert {dim0 % 3, dim1 % 3} == {1, 2}  # the last two of three
        flipped = _Stack(self.weight.transpose(dim0, dim1), self.stack, self.name)
        flipped.transposed = not self.transposed
        return flipped

    def add(self, y: Tensor, x: Tensor, named: Mapping[str, Any]) -> Tensor:
        """Add the low-rank path for rows sorted by expert, or for x (E x T x n), as many rows for each expert."""
        if "offs" in named:
            return self.add_sorted(y, x, named["offs"])
        assert x.dim() == 3
        count, size = x.shape[:2]
        ends = size * torch.arange(1, count + 1, dtype=torch.int32, device=x.device)
        return self.add_sorted(y.flatten(0, 1), x.flatten(0, 1), ends).view(y.shape)

    def add_sorted(self, y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        """Add the low-rank path for rows sorted by expert; `ends` has the row after the last of each expert."""
        stack = self.stack
        inner = stack.dropped_out(x).to(y.dtype)
        low_rank: Any = _GroupedLowRank  # torch leaves `apply` untyped
        result: Tensor = low_rank.apply(
            y, inner, stack.da, stack.db, *stack.joined(inner.dtype), ends, stack.scale
        )
        return result


class _Gathered(_StandIn):
    def __init__(self, whole: _Stack, experts: Tensor) -> None:
        super().__init__(
            whole.weight[experts], whole.stack, whole.name, transposed=whole.transposed
        )
        self._whole = whole
        self._experts = experts

    def add(self, y: Tensor, x: Tensor, named: Mapping[str, Any]) -> Tensor:
        """Add the low-rank path for x (T x 1 x n), or (T x n x 1) where the weights come first."""
        assert x.dim() == 3
        dim = 1 if self.transposed else -1
        # Sort the rows by expert, and put the results back into the order of y.
        order = self._experts.argsort(stable=True)
        experts = torch.arange(len(self._whole.weight), device=order.device)
        ends = torch.searchsorted(self._experts[order], experts, right=True, out_int32=True)
        added = self._whole.add_sorted(y.squeeze(dim)[order], x.squeeze(dim)[order], ends)
        return added[order.argsort()].unsqueeze(dim)


class _GroupedLowRank(torch.autograd.Function):
    """`_Adapted` for rows sorted by expert: y is T x m, x is T x n, down is E x k x n, up is E x m x k."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        da: Tensor,
        db: Tensor,
        down: Tensor,
        up: Tensor,
        ends: Tensor,
        scale: float,
    ) -> Tensor:
        hidden = _by_expert(x, down.mT, ends)
        y.add_(_by_expert(hidden, up.mT, ends), alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, hidden, down, up, ends)
        ctx.rank = da.shape[1]
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_hidden = _by_expert(grad, up, ends) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = _by_expert(grad_hidden, down, ends)
        if down.shape[1] > ctx.rank:
            grad_hidden = grad_hidden[:, ctx.rank :]
            hidden = hidden[:, : ctx.rank] + hidden[:, ctx.rank :]
        grad_da = _by_expert(grad_hidden.T, x, ends)
        grad_db = _by_expert(grad.T, hidden, ends).float() * ctx.scale
        # Kernels promise no result for an expert without rows.
        without = (ends == torch.cat([ends.new_zeros(1), ends[:-1]]))[:, None, None]
        return (
            grad,
            grad_x,
            grad_da.float().masked_fill_(without, 0),
            grad_db.masked_fill_(without, 0),
            *[None] * 4,
        )


def _by_expert(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Return each expert's product: of rows of a (T x n) and its part of b (E x n x m), or of columns and rows."""
    # The kernels take rows that start at multiples of 16 bytes. Fake tensors (train/fake_model.py) have no kernels.
    fake = type(a) is not Tensor
    starts = [a.storage_offset(), *a.stride(), b.storage_offset(), *b.stride()]
    fits = fake or not any(start != 1 and start * a.itemsize % 16 for start in starts)
    runs = a.device.type == "cpu" or (
        a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 0)
    )
    product = getattr(F, "grouped_mm", torch._grouped_mm if fake else None)  # since torch 2.10
    if product is not None and fits and runs:
        return product(a, b, offs=ends)
    parts = [slice(*pair) for pair in itertools.pairwise([0, *ends.tolist()])]
    if b.dim() == 3:
        return torch.cat([a[part] @ each for part, each in zip(parts, b, strict=True)])
    return torch.stack([a[:, part] @ b[part] for part in parts])


_TRANSPOSED: dict[tuple[type[_StandIn], str, int | None], bool] = {
    (_Expert, "linear", 1): False,
    (_Expert, "matmul", 1): True,
    (_Gathered, "bmm", 0): False,
    (_Gathered, "bmm", 1): True,
    (_Gathered, "matmul", 1): True,
    (_Stack, "bmm", 1): True,
    (_Stack, "matmul", 1): True,
    (_Stack, "_grouped_mm", 1): True,
    (_Stack, "grouped_mm", 1): True,
    (_Stack, "grouped_mm_fallback", 1): True,
}
"""The products: (stand-in, torch's name of the function, position of the weight) -> whether it takes (E x) n x m.

`x @ W` is matmul; the last function is transformers'.
"""
