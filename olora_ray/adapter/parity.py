"""The verdict on an export: are adapter folder and merged folder the adapter as trained, on the base as it was?

What decides is exact, and needs no model in memory:

- each merged weight is base + change, within one rounding, and every other byte of the merged folder's weights is the
  base's (adapter/merge_check.py);
- PEFT adapts exactly our layers when it reads the adapter folder, and each one's change is ours within 1e-5
  (adapter/peft_check.py).

Logits of the three models are measured besides where the model fits in memory (adapter/logits.py), and refuse only
what no rounding explains: in bfloat16 a single layer left out of 210 drowns in the rounding that any model of that
precision lives with, so that logits alone are neither sharp nor fair.
"""

from dataclasses import asdict, dataclass
from typing import Any

from olora_ray.adapter.logits import Logits
from olora_ray.adapter.merge_check import Worst
from olora_ray.adapter.peft_check import BOUND, AsPeftReads


@dataclass(frozen=True)
class MergedFolder:
    """What the files of a merged folder say."""

    weights: Worst
    changed: tuple[str, ...]
    """What else of them is not the base's."""

    def problems(self) -> list[str]:
        """One line for each thing that is wrong."""
        found = [f"merged folder: {line}" for line in self.changed]
        if not self.weights.error <= 1.0:
            found.append(
                f"the merged weight of {self.weights.layer} is {self.weights.error:.3g} roundings from base + change;"
                " at most 1 is right"
            )
        return found


@dataclass(frozen=True)
class Parity:
    """Result of all comparisons."""

    merged: MergedFolder | None
    """None if no merged folder was wanted."""
    peft: AsPeftReads
    logits: Logits | str
    """Or why they were not measured."""

    @property
    def ok(self) -> bool:
        """Whether the export is right."""
        return not self.problems()

    def problems(self) -> list[str]:
        """One line for each comparison that is over its bound."""
        found = [] if self.merged is None else self.merged.problems()
        found += [f"adapter folder: {line}" for line in self.peft.problems]
        if not self.peft.problems and not self.peft.error <= BOUND:
            found.append(
                f"the change of {self.peft.layer} is off by {self.peft.error:.3g} of its size as PEFT computes it;"
                f" at most {BOUND:g} is right"
            )
        # Logits of a folder that is known to be wrong say nothing more.
        return found or ([] if isinstance(self.logits, str) else self.logits.problems())

    def in_words(self, quantised: bool = False) -> str:
        """What was found, for a reader of the adapter: bounds that are kept, since figures differ by machine.

        `quantised`: the training had its base quantised, which no export has.
        """
        if not self.ok:
            return "NOT right, see parity.json; do not use it"
        found = [f"PEFT computes each layer's change within {BOUND:g} of its size"]
        if self.merged is not None:
            found.append(
                f"each merged weight is base + change within one rounding to {self.merged.weights.stored}, and all"
                " others are the base's"
            )
        return "; ".join([*found, _logits_in_words(self.logits, quantised)])

    def to_json(self) -> dict[str, Any]:
        """The content of parity.json."""
        return {**asdict(self), "ok": self.ok}


def _logits_in_words(logits: Logits | str, quantised: bool) -> str:
    if isinstance(logits, str):
        return "logits were not compared"
    models = [
        name for name, item in (("the merged model", logits.merged), ("the adapter in PEFT", logits.peft)) if item
    ]
    if not models:
        return "logits were not compared"
    theirs = "the trained adapter on the original weights" if quantised else "the training"
    return f"the logits of {' and of '.join(models)} are those of {theirs} but for rounding"
