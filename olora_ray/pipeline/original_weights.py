"""What it changes that an adapter was trained on a quantised base, and is exported for the original weights."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from olora_ray.cluster.spec import TrainSpec
from olora_ray.pipeline import held_out_loss
from olora_ray.pipeline.export_shares import Work
from olora_ray.pipeline.held_out_loss import LossPair, Side


@dataclass(frozen=True)
class OnOriginal:
    """An adapter of a quantised base on the original one."""

    quantization: str
    """Of the base that it was trained on."""
    rows: Literal["held-out", "training"]
    """Which rows the loss is of: of a training that holds none out, its own."""
    loss: LossPair | str
    """On the quantised base, and on the original; or why it was not measured."""

    def to_json(self) -> dict[str, Any]:
        """For parity.json."""
        return {**asdict(self), "in_words": self.in_words()}

    def in_words(self, reasons: bool = True) -> str:
        """One sentence; without `reasons` nothing in it comes from an error on this machine."""
        what = f"trained on the base as {self.quantization}, exported for the original weights"
        name = "held-out loss" if self.rows == "held-out" else "loss on training rows"
        if isinstance(self.loss, str):
            return f"{what}; the {name} is not measured on both{f': {self.loss}' if reasons else ''}"
        return f"{what}: {name} {self.loss.in_words('on the quantised base', 'on the original')}"


def measure(spec: TrainSpec, work: Work, device: torch.device) -> OnOriginal | None:
    """The loss of the adapter of `work` on both bases; None if the base is not quantised."""
    kind = spec.config.model.quantization
    if kind == "none":
        return None
    store = spec.train if spec.eval is None else spec.eval
    found = held_out_loss.measure(spec, work, store, Side(work.adapter, kind), Side(work.adapter), device)
    return OnOriginal(kind, "training" if spec.eval is None else "held-out", found)
