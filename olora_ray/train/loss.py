"""Cross-entropy summed over supervised tokens only, with the output head applied in chunks.

    loss = sum over supervised tokens t of -log p(token t | tokens before t in its segment)

The caller divides by the number of supervised tokens of the *global* batch, so that the gradient does
not depend on workers, micro-batches or packing. Only positions whose next token is supervised go
through the head, a chunk at a time; the chunk's gradient is taken at once, so logits (rows x
vocabulary) never exist for more than one chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.tokens.collate import Batch
from olora_ray.train.fast_norm import patch_rms_norm

CHUNK_LOGITS = 2**23
"""Logits in one chunk: 32 MiB in float32."""


class SupervisedLoss(nn.Module):
    """A causal language model as a function from a batch to its summed loss.

    It is the root that parallel strategies shard, so that backbone and head are used in one forward.
    The model's frozen norms are given a lighter backward pass (train/fast_norm.py).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
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
        size = self.chunk()
        parts = zip(rows.split(size), batch.labels.split(size), strict=True)
        return torch.cat(
            [F.cross_entropy(self.logits(part).float(), target, reduction="none") for part, target in parts]
        )

    def chunk(self) -> int:
        """How many positions go through the output head at once."""
        model: Any = self.model
        return max(64, CHUNK_LOGITS // int(model.config.get_text_config().vocab_size))

    def hidden(self, batch: Batch) -> Tensor:
        """The backbone's output for every position."""
        backbone: Any = self.model.base_model
        output: Tensor = backbone(**batch.inputs, use_cache=False).last_hidden_state
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """Output head over rows of hidden states, with the scaling some families apply after it."""
        model: Any = self.model
        logits: Tensor = model.get_output_embeddings()(hidden)
        config = model.config.get_text_config()
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: SupervisedLoss) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_grad = ctx.needs_input_grad[0]
        grads = []
        rows = head.chunk()
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
        return grad_hidden * grads[0].to(grad_hidden.dtype), None, None
