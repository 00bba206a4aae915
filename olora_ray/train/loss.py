"""Cross-entropy summed over supervised tokens only, with the output head applied in chunks.

    loss = sum over supervised tokens t of -log p(token t | tokens before t in its segment)

The caller divides by the number of supervised tokens of the *global* batch, so that the gradient does
not depend on workers, micro-batches or packing. Only positions whose next token is supervised go
through the head, a chunk at a time; the chunk's gradient is taken at once, so logits (rows x
vocabulary) never exist for more than one chunk.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.model.head import OutputHead, backbone
from olora_ray.tokens.collate import Batch
from olora_ray.train.base_files import BaseFiles
from olora_ray.train.fast_norm import patch_rms_norm
from olora_ray.train.self_test_result import SelfTest

CHUNK_LOGITS = 2**23
"""Logits in one chunk on a CPU: 32 MiB in float32. They decide its rows, and so the bits of the loss."""
ROWS_ON_GPU = 1024
"""At least so many rows in one chunk on a GPU: each chunk reads the head's weights, twice, and a GPU can do 300
multiplications for each byte that it reads. The logits of a large vocabulary, 128k, take 512 MiB then in float32."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """How many positions go through an output head at once."""
    return max(ROWS_ON_GPU if device.type == "cuda" else 64, CHUNK_LOGITS // vocabulary)


class SupervisedLoss(nn.Module):
    """A causal language model as a function from a batch to its summed loss.

    It is the root that parallel strategies shard, so that backbone and head are used in one forward.
    The model's frozen norms are given a lighter backward pass (train/fast_norm.py).
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises UserError for a model that is not a backbone with an output head."""
        super().__init__()
        self.model = model
        self.logits = OutputHead(model)
        """Output head over rows of hidden states, with all that the family does to its logits."""
        self.tested: SelfTest | None = None
        """What the self-test has found of the base."""
        self.files: BaseFiles | None = None
        """Where whole weights are read of a base that no worker holds whole."""
        self.offloaded: list[nn.Module] = []
        """Of a sharded base, blocks that lie in the memory of the node instead of the GPU's."""
        self.given_masks = False
        """Whether the model is given masks made of the positions: some families make theirs of nothing."""
        self.recompute = False
        """Whether the blocks are run again in the backward pass, once `recompute.install` was called."""
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
        """How many positions go through the output head at once."""
        model: Any = self.model
        return chunk_rows(int(model.config.get_text_config().vocab_size), device)

    def hidden(self, batch: Batch) -> Tensor:
        """The backbone's output for every position."""
        output: Tensor = backbone(self.model)(**self.taken(batch), use_cache=False).last_hidden_state
        return output

    def taken(self, batch: Batch) -> dict[str, Any]:
        """What the backbone is called with: those of a batch's inputs that it takes."""
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
    """What a backbone's forward takes; None: anything. A recurrent one has no use for positions."""
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
        return grad_hidden * grads[0].to(grad_hidden.dtype), None, None
