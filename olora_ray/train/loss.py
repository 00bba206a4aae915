"""Cross-entropy summed over supervised tokens only, with the output head applied in chunks.

    loss = sum over supervised tokens t of -log p(token t | tokens before t in its segment)

The caller divides by the objective's weight of the *global* batch (its supervised tokens), so that the gradient does
not depend on workers, micro-batches or packing. Only positions whose next token is supervised go
through the head, a chunk at a time; the chunk's gradient is taken at once, so logits (rows x
vocabulary) never exist for more than one chunk.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from olora_ray.config.decided import Recompute
from olora_ray.model.packing import OutputHead, backbone
from olora_ray.tokens.collate import PROMPT_ONCE, Batch
from olora_ray.train.parts import Part, replace_rms_norms

# The result of a model's self-test (train/self_test.py).


@dataclass(frozen=True)
class Differences:
    """The largest relative differences with one attention implementation."""

    output: float
    """Difference of a part's output from its output in the model's own attention, on the same input."""
    part: str
    """Name of the part with the largest `output`."""
    loss: float
    """Difference from the cross-entropy of the model's own logits, mean over tokens."""
    change: float
    """Change of a part's output when the other examples, or later tokens, change."""
    changed: str
    """Name of the part with the largest `change`."""
    tolerance: float
    """Largest `output` and `loss` that rounding explains; `change` must be 0."""

    def problem(self, beside: str | None = None) -> str | None:
        """Return the problem in one line, or None; `beside` says where the other examples are that cause it."""
        allowed = f"(rounding explains {self.tolerance:.2g})"
        if self.change > 0:
            cause = f"the other examples {beside}" if beside else "later tokens"
            return f"the output of {self.changed} for an example changes by {self.change:.2g} with {cause}"
        if not self.output <= self.tolerance:
            reference = (
                f"its output without the other examples {beside}"
                if beside
                else "the model's own attention"
            )
            return (
                f"the output of {self.part} differs by {self.output:.2g} from {reference} {allowed}"
            )
        if not self.loss <= self.tolerance:
            return f"the losses differ by {self.loss:.2g} from the losses of the model's own logits {allowed}"
        return None


@dataclass(frozen=True)
class SelfTest:
    attention: str
    given_masks: bool = False
    """True if the model needs masks as inputs, because its own masks ignore the positions."""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """Faster implementation -> the problem that it has."""
    differences: Differences | None = None
    gradients: float | None = None
    """Largest relative difference of an adapter's gradient from its gradient in the model's own attention."""
    seconds: float = 0.0
    without: tuple[str, ...] = ()
    """Layers of "all-linear" that are not adapted, because no gradient reaches them."""
    once: bool = False
    """True if the two answers of a pair have their prompt in common in a batch."""

    @property
    def layout(self) -> str:
        """The attention with the layout of its batches, for `collate`."""
        return self.attention + PROMPT_ONCE if self.once else self.attention

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        line = f"self-test: passed with attention={self.layout}, in {self.seconds:.1f} s"
        differences = self.differences
        if differences is None:
            return line
        return (
            f"{line}; all blocks agree with the model's own attention up to rounding (relative difference"
            f" {differences.output:.1g}, allowed {differences.tolerance:.1g})"
        )


CHUNK_LOGITS = 2**23
"""Logits in one chunk on a CPU: 32 MiB in float32. Another value would change the bits of the loss."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    # Each chunk reads the head's weights twice, and a GPU can do 300 multiplications per byte that it reads. So smaller
    # chunks would leave it idle. With a vocabulary of 128k the logits of a chunk take 512 MiB in float32.
    return max(1024 if device.type == "cuda" else 64, CHUNK_LOGITS // vocabulary)


class SupervisedLoss(nn.Module):
    """Causal language model as a function from a batch to its summed loss.

    FSDP shards this module as the root, so that one forward uses backbone and head. The model's frozen norms get a
    lighter backward pass (`replace_rms_norms`).
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap `model`; raises UserError if it is not a backbone with an output head."""
        super().__init__()
        self.model = model
        self.logits = OutputHead(model)
        """Output head over rows of hidden states, with everything that the family does to its logits."""
        self.tested: SelfTest | None = None
        self.read_rows: Callable[[str, int, int], Tensor] | None = None
        """Reads rows first..last of a parameter from the files of a sharded base; None if the base is not sharded."""
        self.sharded = False
        """True if FSDP has sharded the base: then all workers must run the model equally often (`parallel.shard`)."""
        self.given_masks = False
        """True if the model gets masks made of the positions, because its own masks ignore the positions."""
        self.recompute: Recompute = False
        """True if the backward pass runs the blocks again; "swiglu": it makes two results of each MLP again. Has no
        effect before `parallel.install`."""
        self.fused: list[Part] | None = None
        """The parts of the blocks that run as kernels; None before `parallel.use_kernels`, and on CPUs."""
        parameters = inspect.signature(backbone(model).forward).parameters
        kinds = {item.kind for item in parameters.values()}
        self._takes = frozenset(parameters)
        self._takes_any = inspect.Parameter.VAR_KEYWORD in kinds
        replace_rms_norms(model)

    def forward(self, batch: Batch, each: bool = False) -> Tensor:
        """Return the summed loss, a float32 scalar; with `each` the loss of each supervised token, as `batch.labels`.

        Both are differentiable: the backward pass scales the gradient of each token's hidden state, which the forward
        pass has computed. So an objective may be any function of the tokens' losses, for one pass through the head.
        """
        hidden = self.hidden(batch)
        rows = hidden.reshape(-1, hidden.shape[-1])[batch.predicts]
        chunked: Any = _ChunkedLoss  # torch leaves `apply` untyped
        total, losses = chunked.apply(rows, batch.labels, self)
        chosen: Tensor = losses if each else total
        return chosen

    @torch.no_grad()
    def each(self, batch: Batch) -> Tensor:
        """Return the loss of each supervised token in float32, in the order of `batch.labels`, without gradient."""
        return SupervisedLoss.forward(self, batch, each=True)

    def chunk(self, device: torch.device) -> int:
        model: Any = self.model
        return chunk_rows(int(model.config.get_text_config().vocab_size), device)

    def hidden(self, batch: Batch) -> Tensor:
        output: Tensor = backbone(self.model)(
            **self.taken(batch), use_cache=False
        ).last_hidden_state
        return output

    def taken(self, batch: Batch) -> dict[str, Any]:
        # Backbones take different inputs; a recurrent one takes no positions, for example.
        inputs: dict[str, Any] = {
            name: value
            for name, value in batch.inputs.items()
            if self._takes_any or name in self._takes
        }
        if not self.given_masks:
            return inputs
        from transformers.masking_utils import create_masks_for_generate

        model: Any = self.model
        positions = batch.inputs["position_ids"]
        assert isinstance(positions, Tensor)
        like = torch.empty(*positions.shape, 1, dtype=model.dtype, device=positions.device)
        masks = create_masks_for_generate(model.config, like, None, None, position_ids=positions)
        return inputs | {"attention_mask": masks}


class _ChunkedLoss(torch.autograd.Function):
    """Hidden states and their next tokens -> the sum of the tokens' losses, and each of them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: SupervisedLoss
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_grad = ctx.needs_input_grad[0]
        losses = []
        grads = []
        rows = head.chunk(hidden.device)
        for part, target in zip(hidden.split(rows), labels.split(rows), strict=True):
            with torch.set_grad_enabled(wants_grad):
                part = part.detach().requires_grad_(wants_grad)
                logits = head.logits(part)
            # Not log_softmax: on a CPU it adds 50,000 probabilities one by one, and loses 2e-5 nats per token.
            log_p = logits.detach().float()
            log_p = log_p - log_p.logsumexp(-1, keepdim=True)
            of_targets = log_p.gather(1, target[:, None])
            total -= of_targets.sum()
            losses.append(-of_targets[:, 0])
            if wants_grad:
                # d(-log p_target) / d logits = p - onehot(target), in place, because it is as large as the logits
                grad = log_p.exp_()
                grad.scatter_add_(1, target[:, None], grad.new_full((len(target), 1), -1.0))
                grads.append(torch.autograd.grad(logits, part, grad.to(logits.dtype))[0])
        if wants_grad:
            ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden))
        return total, torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        of_total, of_each = grads
        # One of both is None, because `SupervisedLoss.forward` returns one of them.
        factor = of_total if of_each is None else of_each[:, None]
        # The product is in float32. A factor rounded to bfloat16 would change the size of all gradients by up to 0.4 %.
        return (grad_hidden.float() * factor).to(grad_hidden.dtype), None, None


# The inputs and outputs of layers while the model runs.

See = Callable[[str, Tensor, Tensor], None]
"""Called with the name of a layer, its input and its output."""


@contextmanager
def watched(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    def hand_over(
        name: str, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        see(name, next(iter((*inputs, *named.values()))), output)

    handles = [
        module.register_forward_hook(partial(hand_over, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
