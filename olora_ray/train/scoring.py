"""Scorers of generated answers: each maps (prediction, reference) to named scores in [0, 1].

A scorer may leave a name out where it does not apply: the mean of that score is over the answers that have it.
"""

import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from olora_ray.common import storage
from olora_ray.common.errors import UserError, first_line
from olora_ray.common.storage import digest, digest_file

Scorer = Callable[[str, str], dict[str, float]]


def exact_match(prediction: str, reference: str) -> dict[str, float]:
    """1 where both texts are the same but for white space around them."""
    return {"exact_match": float(prediction.strip() == reference.strip())}


def json_fields(prediction: str, reference: str) -> dict[str, float]:
    """Compare two JSON objects field by field; a prediction that is not one scores 0 everywhere."""
    expected = _json_object(reference)
    if expected is None:
        raise UserError(f"evaluation.scorer: json_fields needs a JSON object as the reference, not {_short(reference)}")
    found = _json_object(prediction)
    fields = {
        f"field/{name}": float(found is not None and name in found and _same(found[name], value))
        for name, value in expected.items()
    }
    return {
        "valid_json": float(found is not None),
        "exact_match": float(found is not None and _same(found, expected)),
        **fields,
    }


SCORERS: dict[str, Scorer] = {"exact_match": exact_match, "json_fields": json_fields}


def resolve(name: str) -> Scorer:
    """The scorer called `name`: one of SCORERS, `package.module:function` or `package.module.function`.

    The module is imported, so its code runs. Raises UserError for a name that leads to no function.
    """
    if name in SCORERS:
        return SCORERS[name]
    module_name, _, function_name = name.rpartition(":" if ":" in name else ".")
    if not module_name or not function_name:
        known = ", ".join(SCORERS)
        raise UserError(f"evaluation.scorer: no scorer is called {name!r}; use {known}, or package.module:function")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError) as error:  # TypeError: a relative name
        raise UserError(f"evaluation.scorer: {name!r}: cannot import {module_name!r}: {error}") from error
    except Exception as error:  # whatever the module does while it is imported
        kind = type(error).__name__
        raise UserError(f"evaluation.scorer: {name!r}: importing {module_name!r} fails: {kind}: {error}") from error
    scorer = getattr(module, function_name, None)
    if not callable(scorer):
        raise UserError(f"evaluation.scorer: {name!r}: {module_name!r} has no function {function_name!r}")
    return scorer  # type: ignore[no-any-return]


def source_digest(name: str) -> str:
    """Digest of the files that have the scorer: the module of its name, and the one that the function is written in.

    A module that these import is not looked at. Raises UserError as `resolve`.
    """
    scorer = resolve(name)
    named = name.rpartition(":" if ":" in name else ".")[0]
    modules = [sys.modules.get(each) for each in (named, getattr(inspect.unwrap(scorer), "__module__", None)) if each]
    files = [Path(file) for each in modules if (file := getattr(each, "__file__", None))]
    return digest(*(digest_file(file) for file in files if file.is_file()), length=16)


TAKEN = ("loss", "perplexity")
"""Names that no score can have: gate and evaluation call it eval/NAME, as they do what is no score."""


class Judge:
    """A scorer by its name, whose mistakes are one line each."""

    def __init__(self, name: str) -> None:
        """Raises UserError as `resolve`."""
        self.name, self._scorer = name, resolve(name)

    def __call__(self, prediction: str, reference: str) -> dict[str, float]:
        """The scores of an answer; raises UserError if the scorer fails, or gives no numbers by names of their own.

        What is not finite is no number: it would be the mean of all answers.
        """
        try:
            found = self._scorer(prediction, reference)
        except UserError:
            raise
        except Exception as error:  # whatever a function of the user does
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"evaluation.scorer: {self.name} fails on the answer {_short(prediction)} to the reference"
                f" {_short(reference)}: {what}"
            ) from error
        try:
            if not isinstance(found, Mapping) or not all(isinstance(name, str) and name for name in found):
                raise TypeError
            scores = {name: float(value) for name, value in found.items()}
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"evaluation.scorer: {self.name} must give {{name: number}}, not {_short(found)}") from None
        if taken := [name for name in TAKEN if name in scores]:
            raise UserError(
                f"evaluation.scorer: {self.name} gives a score called {taken[0]!r}, but eval/{taken[0]} is that of the"
                " held-out rows; give it another name"
            )
        if odd := next((name for name, value in scores.items() if not math.isfinite(value)), None):
            raise UserError(
                f"evaluation.scorer: {self.name} gives {scores[odd]} as {odd!r} for the answer {_short(prediction)} to"
                f" the reference {_short(reference)}; a score that does not apply to an answer is left out"
            )
        return scores


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over the answers that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def partial_scores(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """A line for each score that not all answers have."""
    counts = {name: sum(name in row for row in rows) for name in means(rows)}
    return [
        f"score {name}: {count} of {len(rows)} answers have it, its mean is over these"
        for name, count in counts.items()
        if count < len(rows)
    ]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _json_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _same(left: object, right: object) -> bool:
    """Equality as JSON sees it: true is not 1."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


# Baseline of a run: loss and answers of the untouched base model, measured once and kept beside the checkpoints.


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
        """Read the baseline of the same run and number of questions; None if there is none or it is damaged."""
        try:
            tree = json.loads(storage.read_text(place))
            same = tree.pop("identity") == dict(identity)
            found = TypeAdapter(cls).validate_python(tree)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        finite = found.loss is None or math.isfinite(found.loss)  # what is not is said when it is measured
        return found if same and finite and len(found.answers or []) == questions else None
