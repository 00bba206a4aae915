"""The results for one variant in one precision, the bounds of correct results, and the verdict."""

from dataclasses import dataclass, field

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative bounds in float32. Correct results stay below 1e-6, 1e-5 and 1e-6; the smallest error that the review found
# is 6e-5 of the loss.
LOSS, GRADIENT, EXPORT = 1e-5, 1e-4, 1e-4
# In bfloat16 the bounds are this multiple of the distance between the model's own bfloat16 and float32 results. The
# distance grows with training.
NOISE, NOISE_OF_EXPORT = 4.0, 8.0
# By luck the noise may be smaller.
LEAST_NOISE = 1e-3
# Least change of the losses by training.
LEAST_LEARNT = 1e-2
# Stages before the first step.
BEFORE = ("open", "start")


@dataclass
class Row:
    """The results for one variant in one precision; None: not measured, because the check ended earlier."""

    name: str
    precision: str
    adapters: int = 0
    # Share of the model's parameters with an adapter, without embeddings and head.
    covered: float | None = None
    # Whether experts are adapted: "yes", "no", "some", or "none" if the model has none.
    experts: str | None = None
    attention: str = ""
    # True if the run puts several examples into one sequence.
    packs: bool | None = None
    # True if the untrained adapter leaves every loss unchanged, to the bit.
    start: bool | None = None
    # Difference between the training loss of single examples and the model's own.
    loss: float | None = None
    # Difference between the training loss in the run's layout and that of single examples.
    packed: float | None = None
    # Difference between the gradients of all adapters and those that follow from the model's own.
    gradients: float | None = None
    # Adapters without any gradient.
    still: tuple[str, ...] = ()
    # Layers without an adapter, although the model's own loss has a gradient for them.
    missed: tuple[str, ...] = ()
    # Change of the losses by training.
    learnt: float | None = None
    # Difference of the losses of merged model and adapter in PEFT from those of the trained model; the larger one.
    export: float | None = None
    # The product's own measurement of its export.
    parity: str | None = None
    # Change of the losses of the model's own forward by bfloat16; 0 in float32.
    noise: float = 0.0
    # Change of its gradients.
    gradient_noise: float = 0.0
    # Change of the loss if packing relied on positions alone (of the model, not of the run).
    leaks: float | None = None
    # Measurements that are wrong.
    faults: list[str] = field(default_factory=list)
    # Why the check ended early.
    end: str | None = None
    # The first stage that failed, or "end".
    stage: str = ""

    @property
    def verdict(self) -> str:
        """ "right"; "refused: WHY"; or the faults."""
        wrong = f"WRONG: {'; '.join(self.faults)}" if self.faults else ""
        return "; then ".join(part for part in (wrong, self.end) if part) or "right"

    @property
    def right(self) -> bool:
        """True if the check went to the end without faults."""
        return self.verdict == "right"

    @property
    def refused(self) -> bool:
        """True if the check ended in one line before the first step, and without faults before."""
        return not self.faults and self.stage in BEFORE and (self.end or "").startswith("refused")

    def judge_start(self) -> None:
        """Note faults before the first step."""
        if not self.start:
            self.faults.append("the start differs from the base")
        bound = self._bound(LOSS, NOISE, self.noise)
        self._need("loss", self.loss, bound)
        self._need("packed", self.packed, bound)
        if not self.faults:  # wrong losses have wrong gradients
            self._need(
                "gradients", self.gradients, self._bound(GRADIENT, NOISE, self.gradient_noise)
            )
        if self.missed:
            self.faults.append(
                f"{len(self.missed)} layers are left out that have a gradient ({self.missed[0]})"
            )
        if self.still:
            self.faults.append(
                f"{len(self.still)} of {self.adapters} adapters get no gradient ({self.still[0]})"
            )

    def judge_training(self) -> None:
        """Note a training that has changed nothing: an export then proves nothing."""
        assert self.learnt is not None
        if not self.learnt > LEAST_LEARNT:
            self.faults.append(f"training has moved the losses by {self.learnt:.1e} only")

    def judge_export(self) -> None:
        """Note a wrong export; the export of a wrongly trained model is not judged."""
        if not self.faults:
            self._need("export", self.export, self._bound(EXPORT, NOISE_OF_EXPORT, self.noise))

    def _need(self, what: str, off: float | None, bound: float) -> None:
        """Note a difference that is not within a bound; NaN never is."""
        assert off is not None
        if not off <= bound:
            self.faults.append(f"{what} {off:.1e} off")

    def _bound(self, exact: float, times: float, noise: float) -> float:
        return exact if self.precision == "fp32" else times * max(noise, LEAST_NOISE)
