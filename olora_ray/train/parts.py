"""The parts of a block between its products, each as one kernel: RMSNorm, SwiGLU and rotary positions.

On a GPU with Triton these parts run as kernels (train/kernels.py), forward and backward, and keep less for the backward
pass. A part is found by what it computes, and not by the name of its family. Elsewhere the same objects run the
family's code, which the self-test (train/self_test.py) also takes as the reference. No GPU has run the kernels: they
compile for five types of GPUs, and agree with the families' code in Triton's interpreter (tests/train/test_kernels.py).
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from olora_ray.common.device import lacks_memory
from olora_ray.common.errors import first_line
from olora_ray.config.decided import Recompute

TOLERANCE = {torch.float32: 2.0**-13, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""Largest relative difference of an output or a gradient. In bfloat16, rounding was seen to cause a third of it; a
softmax scale that is 10 % wrong in a trained model causes four times as much."""


# The kernels as operators of torch, which are counted like torch's own. On the meta device they have shapes only.


_OPERATORS = torch.library.Library("olora_ray", "DEF")
_BLOCK = 2048
"""Numbers that a program of an elementwise kernel computes."""


def _operator(function: Callable[..., Any]) -> Any:
    name = function.__name__
    _OPERATORS.define(torch.library.infer_schema(function, mutates_args=(), op_name=name))
    _OPERATORS.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.olora_ray, name)


def _run(kernel: str, programs: int, block: int, *given: Any, **constants: bool) -> None:
    if given[0].is_meta:
        return
    from olora_ray.train import kernels  # imports Triton

    warps = max(1, min(16, block // 512))
    getattr(kernels, kernel)[(programs,)](*given, BLOCK=block, num_warps=warps, **constants)


def _by_row(kernel: str, x: Tensor, *more: Any) -> None:
    n = x.shape[-1]
    _run(kernel, x.numel() // n, 1 << (n - 1).bit_length(), x, *more, n)


def _by_block(kernel: str, x: Tensor, *more: Any, **constants: bool) -> None:
    n = x.numel()
    _run(kernel, -(-n // _BLOCK), _BLOCK, x, *more, n, **constants)


@_operator
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x (..., n), and 1 / RMS of each row (..., 1) in float32."""
    y = torch.empty_like(x)
    r = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _by_row("rms_norm", x, weight, y, r, eps)
    return y, r


@_operator
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    grad_x = torch.empty_like(x)
    _by_row("rms_norm_backward", grad.contiguous(), x, weight, r, grad_x)
    return grad_x


@_operator
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    product = torch.empty_like(gate)
    _by_block("swiglu", gate, up, product)
    return product


@_operator
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    # Not into the memory of gate and up: a hook may still hold them.
    grad_gate = torch.empty_like(gate)
    grad_up = torch.empty_like(up)
    _by_block("swiglu_backward", grad.contiguous(), gate, up, grad_gate, grad_up)
    return grad_gate, grad_up


@_operator
def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Rotate heads (B, H, T, D) by angles (B, T, D); `back` is the transpose, for gradients."""
    # In memory the heads of a token lie together, so this copies nothing.
    rows = x.transpose(1, 2).contiguous()
    y = torch.empty_like(rows)
    heads, size = rows.shape[2:]
    _by_block("rotate", rows, cos, sin, y, heads, size, BACK=back)
    return y.transpose(1, 2)


def _runs(device: str | None, *tensors: Tensor) -> bool:
    """True if these tensors are on a device of the type whose tensors go through kernels, in one precision."""
    first = tensors[0]
    return first.device.type == device and all(each.dtype == first.dtype for each in tensors)


# RMSNorm with a backward pass written by hand, for frozen weights.
#
# A family's own norm keeps its input in float32 for the backward pass. This one keeps the input as it is: in bfloat16
# SmolLM2-135M then saves 889 instead of 958 KB per token for the backward pass, 7 % less. It takes the same time on a
# CPU.


def replace_rms_norms(model: nn.Module) -> None:
    """Put a LightRMSNorm in place of each frozen RMSNorm that computes the same."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, LightRMSNorm) or not type(norm).__name__.endswith("RMSNorm"):
                continue
            # A family may compute something else under this name. So a norm is replaced only if LightRMSNorm gives the
            # same bits for random input.
            if _same(norm):
                setattr(parent, name, LightRMSNorm(norm))


class LightRMSNorm(nn.Module):
    """Replacement of a family's RMSNorm, with the same weight and the same forward pass."""

    on: str | None = None
    """Type of the device whose tensors go through kernels."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        n = len(norm.weight)
        self.shapes = ((3, n), (n,))
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon
        self._replaced = (
            norm,
        )  # in a tuple, because a module would be a child with a weight of its own name

    def forward(self, x: Tensor) -> Tensor:
        run = self.kernel if _runs(self.on, x, self.weight) else self.plain
        y: Tensor = run(x, self.weight)
        return y

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return _rms_norm(x, weight, self.variance_epsilon, False)

    def kernel(self, x: Tensor, weight: Tensor) -> Tensor:
        return _rms_norm(x, weight, self.variance_epsilon, True)

    def plainly(self, x: Tensor) -> Tensor:
        """Compute `forward` with the family's norm and torch's own backward pass: the self-test compares with it."""
        # Its own weight may be from before the base was sharded or read from its files.
        return _with_weight(self._replaced[0], self.weight, x)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, kernel: bool) -> Tensor:
    y: Tensor = _RMSNorm.apply(x, weight, eps, kernel)  # type: ignore[no-untyped-call]
    return y


def _with_weight(norm: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    y: Tensor = torch.func.functional_call(norm, {"weight": weight}, (x,))
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernel: bool) -> Tensor:
        ctx.kernel = kernel
        if kernel:
            x = x.contiguous()
            y, r = rms_norm(x, weight, eps)
        else:
            wide = x.float()
            r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            y = weight * (wide * r).to(x.dtype)
        ctx.save_for_backward(x, weight, r)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, r = ctx.saved_tensors
        if ctx.kernel:
            grad_x: Tensor = rms_norm_backward(grads[0], x, weight, r)
            return grad_x, None, None, None
        g = (grads[0] * weight).float()
        wide = x.float()
        total = torch.linalg.vecdot(g, wide)[..., None]
        g.mul_(r).addcmul_(wide, r.pow(3) * total, value=-1 / x.shape[-1])
        return g.to(x.dtype), None, None, None


@torch.no_grad()
def _same(norm: Any) -> bool:
    names = [name for name, _ in norm.named_parameters()]
    if names != ["weight"] or norm.weight.requires_grad or not hasattr(norm, "variance_epsilon"):
        return False
    weight = norm.weight
    if weight.is_meta:  # it has no numbers to compute with
        numbers = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
        weight = numbers.to(weight.dtype)
    x = torch.randn(4, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    light = _rms_norm(x, weight, norm.variance_epsilon, kernel=False)
    return torch.equal(_with_weight(norm, weight, x), light)


# SwiGLU, of which the backward pass may make the results again.


SWIGLU: Recompute = "swiglu"
_FORMULA = "self.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))"
"""The forward of an MLP whose two results can be made again, without blanks; families share its text."""


def light_mlps(loss: Any, blocks: Iterable[nn.Module]) -> "list[LightMLP]":
    """Wrap the forwards of the MLPs in these blocks that have the usual formula, and return them."""
    found: list[LightMLP] = []
    for block in blocks:
        for part in block.modules():
            if not hasattr(part, "act_fn"):
                continue
            forward: Any = part.forward
            if not isinstance(forward, LightMLP):
                text = inspect.getsource(type(part).forward)
                if _FORMULA not in "".join(text.split()):
                    continue
                forward = LightMLP(part, loss)
                part.__dict__["forward"] = forward
            found.append(forward)
    return found


class LightMLP:
    """Forward of an MLP that may make act(gate(x)) and its product with up(x) again in the backward pass.

    They are two of the four wide tensors that it would keep, and need no product of matrices. A kernel keeps neither
    of them for itself; the product is still the input of `down_proj`.
    """

    on: str | None = None
    shapes = ((3, 700), (3, 700))

    def __init__(self, mlp: Any, loss: Any) -> None:
        self.__wrapped__ = mlp.forward
        self._act = mlp.act_fn
        self._mlp = mlp
        self._loss = loss

    def __call__(self, x: Tensor) -> Any:
        again = self._loss.recompute == SWIGLU and torch.is_grad_enabled()
        kernel = x.device.type == self.on
        if not (again or kernel):
            return self.__wrapped__(x)
        mlp = self._mlp
        gate = mlp.gate_proj(x)
        up = mlp.up_proj(x)
        if not again:
            return mlp.down_proj(self._product(gate, up))
        kept_gate = gate.detach()
        kept_up = up.detach()
        made_again: dict[int, Callable[[], Tensor]] = {}

        def pack(saved: Tensor) -> Any:
            return made_again.get(saved.untyped_storage()._cdata, saved)

        def unpack(packed: Any) -> Any:
            return packed() if callable(packed) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            if kernel:
                product = self._product(gate, up)
            else:
                active = self._act(gate)
                made_again[active.untyped_storage()._cdata] = lambda: self._act(kept_gate)
                product = active * up
            made_again[product.untyped_storage()._cdata] = lambda: self._product(kept_gate, kept_up)
            return mlp.down_proj(product)

    def _product(self, gate: Tensor, up: Tensor) -> Tensor:
        run = self.kernel if _runs(self.on, gate, up) else self.plain
        return run(gate, up)

    def plain(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._act(gate) * up  # type: ignore[no-any-return]

    def kernel(self, gate: Tensor, up: Tensor) -> Tensor:
        return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Any:
        gate = gate.contiguous()
        up = up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return swiglu_backward(grads[0], *ctx.saved_tensors)


# Rotary positions: a function in the module of a family's attention.


_ROTARY = "apply_rotary_pos_emb"


class Rotary:
    """A family's function of rotary positions, for all models of this family in the process."""

    on: str | None = None
    shapes = ((2, 3, 5, 8), (2, 5, 8), (2, 5, 8))

    def __init__(self, plainly: Callable[..., Any]) -> None:
        self.__wrapped__ = plainly

    def __call__(self, *given: Any, **named: Any) -> Any:
        if len(given) != 4 or named or not _runs(self.on, *given):
            return self.__wrapped__(*given, **named)
        q, k, cos, sin = given
        if q.dim() != 4 or cos.shape != (len(q), *q.shape[2:]):
            return self.__wrapped__(*given)
        return self.kernel(q, cos, sin), self.kernel(k, cos, sin)

    def plain(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, _ = self.__wrapped__(x, x, cos, sin)
        return turned  # type: ignore[no-any-return]

    def kernel(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _Rotated.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return rotate(grads[0], *ctx.saved_tensors, True), None, None


def _rotaries(blocks: Iterable[nn.Module]) -> list[Rotary]:
    """Wrap the functions of rotary positions that the blocks' attention calls, and return them."""
    modules = {type(part).__module__ for block in blocks for part in block.modules()}
    found = []
    for module in map(sys.modules.get, sorted(modules)):
        function = getattr(module, _ROTARY, None)
        if function is None:
            continue
        if not isinstance(function, Rotary):
            function = Rotary(function)
            setattr(module, _ROTARY, function)
        found.append(function)
    return found


# The choice between kernels and the families' code.


Part = LightRMSNorm | LightMLP | Rotary


def find(loss: Any, blocks: Sequence[nn.Module]) -> list[Part]:
    """Return the parts of a model and its blocks that kernels may compute."""
    norms = [part for part in loss.model.modules() if isinstance(part, LightRMSNorm)]
    return [*norms, *light_mlps(loss, blocks), *_rotaries(blocks)]


def switch(parts: Iterable[Part], on: str | None) -> None:
    """Let kernels compute these parts for tensors on devices of the type `on`; None: for none."""
    for part in parts:
        part.on = on


@contextmanager
def plainly(loss: Any) -> Iterator[None]:
    """Run the families' code inside a `with` block."""
    parts = loss.fused or []
    on = parts[0].on if parts else None
    switch(parts, None)
    try:
        yield
    finally:
        switch(parts, on)


def problem(part: Part, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a kernel cannot compute this part on this device, or None: its output and gradients are compared."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in part.shapes]
    name = type(part).__name__
    try:
        ours, own = (_results(function, drawn) for function in (part.kernel, part.plain))
        for one, other in zip(ours, own, strict=True):
            # A kernel has no gradient of a norm's weight, and of angles.
            if one is not None:
                off = (one - other).float().norm() / other.float().norm()
                if not off <= TOLERANCE[dtype]:
                    return f"{name} differs by {float(off):.2g}"
    except Exception as error:
        # It may come from the compiler, the device, or a family's function with other arguments.
        if lacks_memory(error, device):
            raise
        return f"{name}: {type(error).__name__}: {first_line(error)}"
    return None


@torch.enable_grad()
def _results(function: Callable[..., Tensor], drawn: Iterable[Tensor]) -> list[Any]:
    given = [each.clone().requires_grad_() for each in drawn]
    output = function(*given)
    slope = torch.linspace(-1, 1, output.numel()).to(output).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, given, slope, allow_unused=True)]
