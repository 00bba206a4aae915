"""What a compressed adapter has lost: a share of the change of the weights, and what that costs on held-out rows."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from olora_ray.cluster.spec import TrainSpec
from olora_ray.pipeline import held_out_loss
from olora_ray.pipeline.export_shares import Work
from olora_ray.pipeline.held_out_loss import Adapter, LossPair, Side


@dataclass(frozen=True)
class Compressed:
    """An adapter that was exported at a smaller rank than it was trained at."""

    rank: int
    lost: float
    """Share of the change of the weights, in the Frobenius norm."""
    loss: LossPair | str | None = None
    """With the adapter as trained, and with the compressed one; or why it was not measured; None where nothing is
    lost."""

    def to_json(self) -> dict[str, Any]:
        """For parity.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def in_words(self, reasons: bool = True) -> str:
        """One sentence; without `reasons` nothing in it comes from an error on this machine."""
        share = f"{self.lost:.2%} of the change of the weights is lost"
        if self.loss is None:
            return share
        if isinstance(self.loss, str):
            return f"{share}; the held-out loss is not measured{f': {self.loss}' if reasons else ''}"
        return f"{share}; held-out loss {self.loss.in_words('before compression', 'after')}"


def measure(spec: TrainSpec, work: Work, smaller: Adapter, device: torch.device) -> LossPair | str:
    """The loss on held-out rows with the adapter of `work` and with `smaller`, both on the weights as they are stored.

    Or why it is not measured.
    """
    if spec.eval is None:
        return "no rows are held out"
    return held_out_loss.measure(spec, work, spec.eval, Side(work.adapter), Side(smaller), device)
