"""Result of a model's self-test (train/self_test.py)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Differences:
    """Mean absolute differences of a token's loss under one attention."""

    loss: float
    """From the cross-entropy of the model's own logits, computed the same way."""
    alone: float
    """From the model's own attention."""
    beside: float
    """Of an example beside others, from alone."""
    depends: float
    """Change by what the other examples say, or what comes after."""
    explained: float
    """What rounding explains of `alone` and `beside`."""

    def problem(self, packed: bool) -> str | None:
        """What is wrong in one line, or None."""
        for name, value in (("loss", self.loss), ("alone", self.alone)):
            if not value <= self.explained:
                what = "the model's own logits" if name == "loss" else "the model alone"
                return f"losses differ by {value:.2g} from those of {what}; rounding explains {self.explained:.2g}"
        if not self.beside <= self.explained or self.depends > 0:
            where = "in its sequence" if packed else "in its micro-batch"
            return f"the losses of an example change by {max(self.beside, self.depends):.2g} with the others {where}"
        return None


@dataclass(frozen=True)
class SelfTest:
    """What the self-test has found."""

    attention: str
    """The implementation that is used."""
    given_masks: bool = False
    """Whether the model has to be given its masks: it makes them of nothing."""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """Those that would have been faster -> what is wrong with them."""
    differences: Differences | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for result.json."""
        return asdict(self)

    def line(self) -> str:
        """A line for the log."""
        found = self.differences
        shown = f"losses right to {max(found.loss, found.alone, found.beside):.1g}" if found else ""
        return f"self-test: {shown} with attention={self.attention}, in {self.seconds:.1f} s"
