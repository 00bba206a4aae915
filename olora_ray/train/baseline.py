"""Baseline of a run: loss and answers of the untouched base model, measured once and kept beside the checkpoints."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from olora_ray.common import storage


@dataclass(frozen=True)
class Baseline:
    """Loss and answers of the base model."""

    loss: float | None
    """Mean held-out loss per supervised token; None without held-out rows."""
    answers: list[list[int]] | None
    """Answers to the held-out prompts, as token ids; None if none were asked for."""

    def write(self, place: str, identity: Mapping[str, str]) -> None:
        """Keep it. If the storage cannot be written, a resumed run measures again: no error."""
        try:
            text = json.dumps({"identity": dict(identity), "loss": self.loss, "answers": self.answers})
            storage.write_text(place, text)
        except OSError:
            pass

    @classmethod
    def read(cls, place: str, identity: Mapping[str, str], questions: int) -> "Baseline | None":
        """What was kept for the same run and number of questions; None if there is nothing or it is damaged."""
        try:
            tree = json.loads(storage.read_text(place))
            loss, answers = tree["loss"], tree["answers"]
            if tree["identity"] != dict(identity) or len(answers or []) != questions:
                return None
            answers = None if answers is None else [[int(token) for token in line] for line in answers]
            if loss is not None and not math.isfinite(loss):
                return None  # it says so when it is measured
            return cls(None if loss is None else float(loss), answers)
        except (OSError, ValueError, KeyError, TypeError, OverflowError):  # the last: of 1e999
            return None
