"""Cross-entropy summed over supervised tokens only, with the output head applied in chunks.

    loss = sum over supervised tokens t of -log p(token t | tokens before t in its segment)

The caller divides by the number of supervised tokens of the *global* batch, so that the gradient does
not depend on workers, micro-batches or packing. Only positions whose next token is supervised go
through the head, a chunk at a time; the chunk's gradient is taken at once, so logits (rows x
vocabulary) never exist for more than one chunk.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.model.packing import OutputHead, backbone
from olora_ray.tokens.collate import Batch

# RMSNorm with a backward pass written by hand, for frozen weights.


def patch_rms_norm(model: nn.Module) -> int:
    """Let the model's RMSNorms use this backward pass; returns how many do.

    A family may compute the same name differently: a norm is only replaced if its output for random
    input has the same bits.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    chosen = [module for module in found if _same(module)]
    for module in chosen:
        module.__dict__["family"], module.__class__ = type(module), LightRMSNorm
    return len(chosen)


class LightRMSNorm(nn.Module):
    """Stands in for a family's RMSNorm."""

    weight: Tensor
    variance_epsilon: float
    family: type[nn.Module]
    """The class that it stands in for."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> y (..., n)."""
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return weight * (wide * r).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        g, wide = (grads[0] * weight).float(), x.float()
        mean = torch.linalg.vecdot(g, wide)[..., None] / x.shape[-1]
        return g.mul_(r).addcmul_(wide, r.pow(3) * mean, value=-1).to(x.dtype), None, None


@torch.no_grad()
def _same(module: nn.Module) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or eps is None or weight.requires_grad:
        return False
    if weight.is_meta:  # a model without weights: a copy is asked that has some
        weight, module = _some_like(weight), copy.copy(module)
        module._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    x = torch.randn(4, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    return torch.equal(module(x), _RMSNorm.apply(x, weight, eps))  # type: ignore[no-untyped-call]


def _some_like(weight: Tensor) -> Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.dtype)


# Result of a model's self-test (train/self_test.py).


@dataclass(frozen=True)
class Differences:
    """The largest differences under one attention, relative."""

    output: float
    """Of a part's output on the same input, from that in the model's own attention."""
    part: str
    loss: float
    """From the cross-entropy of the model's own logits, mean over tokens."""
    change: float
    """Of a part's output by what the other examples say, or what comes after."""
    changed: str
    """The part whose output it is."""
    tolerance: float
    """What is allowed for rounding, of `output` and `loss`; nothing of `change`."""

    def problem(self, beside: str | None = None) -> str | None:
        """Return the problem in one line, or None; `beside` says where other examples are, if these are to blame."""
        allowed = f"(rounding explains {self.tolerance:.2g})"
        if self.change > 0:
            what = f"the others {beside}" if beside else "what comes after it"
            return f"the output of {self.changed} for an example changes by {self.change:.2g} with {what}"
        if not self.output <= self.tolerance:
            what = f"without the others {beside}" if beside else "in the model's own attention"
            return f"the output of {self.part} differs by {self.output:.2g} from that {what} {allowed}"
        if not self.loss <= self.tolerance:
            return f"the losses differ by {self.loss:.2g} from those of the model's own logits {allowed}"
        return None


@dataclass(frozen=True)
class SelfTest:
    """The result of a self-test that has passed."""

    attention: str
    """The implementation that is used."""
    given_masks: bool = False
    """True if the model needs masks as inputs: its own ignore the positions."""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """Faster implementations -> the problem of each."""
    differences: Differences | None = None
    gradients: float | None = None
    """The largest relative difference of an adapter's gradient from that in the model's own attention."""
    seconds: float = 0.0
    without: tuple[str, ...] = ()
    """Layers of "all-linear" that no gradient reaches, which are not adapted."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for result.json."""
        return asdict(self)

    def line(self) -> str:
        """A line for the log."""
        line = f"self-test: passed with attention={self.attention}, in {self.seconds:.1f} s"
        if (found := self.differences) is None:
            return line
        return (
            f"{line}; each part of a block computes what it does in the model's own attention, up to rounding (relative"
            f" difference {found.output:.1g}, allowed {found.tolerance:.1g})"
        )


CHUNK_LOGITS = 2**23
"""Logits in one chunk on a CPU: 32 MiB in float32. They decide its rows, and so the bits of the loss."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """The number of positions that go through an output head at once."""
    # Each chunk reads the head's weights, twice, and a GPU can do 300 multiplications for each byte that it reads. The
    # logits of a large vocabulary, 128k, take 512 MiB then in float32.
    return max(1024 if device.type == "cuda" else 64, CHUNK_LOGITS // vocabulary)


class SupervisedLoss(nn.Module):
    """A causal language model as a function from a batch to its summed loss.

    It is the root that parallel strategies shard, so that backbone and head are used in one forward.
    The model's frozen norms are given a lighter backward pass (`patch_rms_norm`).
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises UserError for a model that is not a backbone with an output head."""
        super().__init__()
        self.model = model
        self.logits = OutputHead(model)
        """Output head over rows of hidden states, with all that the family does to its logits."""
        self.tested: SelfTest | None = None
        """The self-test's result for the base."""
        self.read_rows: Callable[[str, int, int], Tensor] | None = None
        """Reads rows first..last of a parameter from the files of a base that no worker holds whole."""
        self.offloaded: list[nn.Module] = []
        """Blocks of a sharded base that lie in the memory of the node instead of the GPU's."""
        self.given_masks = False
        """True if the model is given masks made of the positions, which some families ignore in their own."""
        self.recompute = False
        """True if the blocks are run again in the backward pass, once `parallel.install` was called."""
        self._takes = _arguments(backbone(model))
        patch_rms_norm(model)

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss in float32, a scalar."""
        hidden = self.hidden(batch)
        rows = hidden.reshape(-1, hidden.shape[-1])[batch.predicts]
        chunked: Any = _ChunkedLoss  # torch leaves `apply` untyped
        total: Tensor = chunked.apply(rows, batch.labels, self)
        return total

    @torch.no_grad()
    def each(self, batch: Batch) -> Tensor:
        """The loss of each supervised token in float32, in the order of `batch.labels`."""
        hidden = self.hidden(batch)
        rows = hidden.reshape(-1, hidden.shape[-1])[batch.predicts]
        size = self.chunk(rows.device)
        parts = zip(rows.split(size), batch.labels.split(size), strict=True)
        return torch.cat(
            [F.cross_entropy(self.logits(part).float(), target, reduction="none") for part, target in parts]
        )

    def chunk(self, device: torch.device) -> int:
        """The number of positions that go through the output head at once."""
        model: Any = self.model
        return chunk_rows(int(model.config.get_text_config().vocab_size), device)

    def hidden(self, batch: Batch) -> Tensor:
        """The backbone's output for every position."""
        output: Tensor = backbone(self.model)(**self.taken(batch), use_cache=False).last_hidden_state
        return output

    def taken(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the backbone: those of a batch's inputs that it takes."""
        found = {name: value for name, value in batch.inputs.items() if self._takes is None or name in self._takes}
        return found | {"attention_mask": self._masks(batch)} if self.given_masks else found

    def _masks(self, batch: Batch) -> Any:
        """The masks of a batch's positions, one for each kind of layer, as the model itself takes them."""
        from transformers.masking_utils import create_masks_for_generate

        model: Any = self.model
        positions = batch.inputs["position_ids"]
        assert isinstance(positions, Tensor)
        like = torch.empty(*positions.shape, 1, dtype=model.dtype, device=positions.device)
        return create_masks_for_generate(model.config, like, None, None, position_ids=positions)


def _arguments(module: nn.Module) -> frozenset[str] | None:
    """Names of the arguments of a backbone's forward; None: any. A recurrent backbone takes no positions."""
    parameters = inspect.signature(module.forward).parameters
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values()):
        return None
    return frozenset(parameters)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: SupervisedLoss) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_grad = ctx.needs_input_grad[0]
        grads = []
        rows = head.chunk(hidden.device)
        for part, target in zip(hidden.split(rows), labels.split(rows), strict=True):
            with torch.set_grad_enabled(wants_grad):
                part = part.detach().requires_grad_(wants_grad)
                logits = head.logits(part)
            log_p = F.log_softmax(logits.detach().float(), dim=-1)
            total -= log_p.gather(1, target[:, None]).sum()
            if wants_grad:
                # d(-log p_target) / d logits = p - onehot(target), made in place
                grad = log_p.exp_()
                grad.scatter_add_(1, target[:, None], grad.new_full((len(target), 1), -1.0))
                grads.append(torch.autograd.grad(logits, part, grad.to(logits.dtype))[0])
        if wants_grad:
            ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        # A factor that is rounded to bfloat16 first would change the size of all gradients, by up to 0.4 %.
        return (grad_hidden.float() * grads[0]).to(grad_hidden.dtype), None, None
