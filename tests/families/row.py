"""What is known of one variant in one precision, the bounds of what is right, and the verdict."""

from dataclasses import dataclass, field

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS, GRADIENT, EXPORT = 1e-5, 1e-4, 1e-4
"""Bounds in float32, relative. What is right stays below 1e-6, 1e-5 and 1e-6; the smallest error that the review found
is 6e-5 of the loss."""
NOISE, NOISE_OF_EXPORT = 4.0, 8.0
"""In bfloat16 the bounds are as many times what a bfloat16 model's own forward is away from its float32 one. A trained
model says more, and is away further."""
LEAST_NOISE = 1e-3
"""By luck that may be small."""
LEAST_LEARNT = 1e-2
"""How far training must have moved the losses."""
BEFORE = ("open", "start")
"""Stages before the first step."""


@dataclass
class Row:
    """What is known of one variant in one precision; None: not measured, because it ended before."""

    name: str
    precision: str
    adapters: int = 0
    covered: float | None = None
    """Share of the model's parameters that lie behind an adapter, but for embeddings and head."""
    experts: str | None = None
    """Whether experts are adapted: "yes", "no", "some", or "none" in this model."""
    attention: str = ""
    packs: bool | None = None
    """Whether the run puts several examples in one sequence."""
    start: bool | None = None
    """Whether the untrained adapter leaves every loss as it is, to the bit."""
    loss: float | None = None
    """Difference of the training loss of single examples from the model's own."""
    packed: float | None = None
    """Difference of the training loss of examples as the run lays them out from that of single ones."""
    gradients: float | None = None
    """Difference of the gradients of all adapters from those that follow from the model's own."""
    still: tuple[str, ...] = ()
    """Adapters without any gradient."""
    missed: tuple[str, ...] = ()
    """Layers that are not adapted, though the model's own loss has a gradient for them."""
    learnt: float | None = None
    """How far training has moved the losses."""
    export: float | None = None
    """Difference of the losses of merged model and adapter in PEFT from those of the trained model; the larger one."""
    parity: str | None = None
    """What the product says of its export."""
    noise: float = 0.0
    """How far bfloat16 moves the losses of the model's own forward; 0 in float32."""
    gradient_noise: float = 0.0
    """The same of its gradients."""
    leaks: float | None = None
    """What packing by positions alone would do to the loss (of the model, not of the run)."""
    faults: list[str] = field(default_factory=list)
    """What was measured and is wrong."""
    end: str | None = None
    """Why it ended before its end."""
    stage: str = ""
    """How far it came: the first stage that failed, or "end"."""

    @property
    def verdict(self) -> str:
        """right; refused: WHY; or what must not be."""
        wrong = f"WRONG: {'; '.join(self.faults)}" if self.faults else ""
        return "; then ".join(part for part in (wrong, self.end) if part) or "right"

    @property
    def right(self) -> bool:
        """Whether it went to the end, and all is as it should be."""
        return self.verdict == "right"

    @property
    def refused(self) -> bool:
        """Whether it ended in one line before the first step, and not after something wrong."""
        return not self.faults and self.stage in BEFORE and (self.end or "").startswith("refused")

    def judge_start(self) -> None:
        """Note what is wrong before the first step."""
        if not self.start:
            self.faults.append("the start differs from the base")
        bound = self._bound(LOSS, NOISE, self.noise)
        self._need("loss", self.loss, bound)
        self._need("packed", self.packed, bound)
        if not self.faults:  # wrong losses have wrong gradients
            self._need("gradients", self.gradients, self._bound(GRADIENT, NOISE, self.gradient_noise))
        if self.missed:
            self.faults.append(f"{len(self.missed)} layers are left out that have a gradient ({self.missed[0]})")
        if self.still:
            self.faults.append(f"{len(self.still)} of {self.adapters} adapters get no gradient ({self.still[0]})")

    def judge_training(self) -> None:
        """Note a training that has changed nothing, with which an export proves nothing."""
        assert self.learnt is not None
        if not self.learnt > LEAST_LEARNT:
            self.faults.append(f"training has moved the losses by {self.learnt:.1e} only")

    def judge_export(self) -> None:
        """Note a wrong export; that of a model that was trained wrong agrees with nothing."""
        if not self.faults:
            self._need("export", self.export, self._bound(EXPORT, NOISE_OF_EXPORT, self.noise))

    def _need(self, what: str, off: float | None, bound: float) -> None:
        """Note a difference that is not within a bound; NaN is not."""
        assert off is not None
        if not off <= bound:
            self.faults.append(f"{what} {off:.1e} off")

    def _bound(self, exact: float, times: float, noise: float) -> float:
        return exact if self.precision == "fp32" else times * max(noise, LEAST_NOISE)
