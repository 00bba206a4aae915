"""Scorers of generated answers: each maps (prediction, reference) to named scores in [0, 1].

A scorer may leave out a score that does not apply to an answer; its mean is over the answers that have it.
"""

import contextlib
import importlib
import inspect
import json
import logging
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

from olora_ray.common import records
from olora_ray.common.errors import UserError, first_line
from olora_ray.common.storage import digest, digest_file
from olora_ray.config import command_line

logger = logging.getLogger(__name__)

Scorer = Callable[[str, str], dict[str, float]]


def exact_match(prediction: str, reference: str) -> dict[str, float]:
    """Score 1 if both texts are the same, except for white space around them."""
    return {"exact_match": float(prediction.strip() == reference.strip())}


def json_fields(prediction: str, reference: str) -> dict[str, float]:
    """Compare two JSON objects field by field; a prediction that is not a JSON object scores 0 everywhere."""
    expected = _json_object(reference)
    if expected is None:
        raise UserError(
            f"evaluation.scorer: json_fields needs a JSON object as the reference, not {_short(reference)}"
        )
    predicted = _json_object(prediction)
    fields = {
        f"field/{name}": float(
            predicted is not None and name in predicted and _same(predicted[name], value)
        )
        for name, value in expected.items()
    }
    return {
        "valid_json": float(predicted is not None),
        "exact_match": float(predicted is not None and _same(predicted, expected)),
        **fields,
    }


SCORERS: dict[str, Scorer] = {"exact_match": exact_match, "json_fields": json_fields}


def resolve(name: str) -> Scorer:
    """Return the scorer `name`: one of SCORERS, `package.module:function` or `package.module.function`.

    Imports the module, so its code runs. It may be one of pipelines/contrib: `mobility.answer:next_place`. Raises
    UserError if there is no such function.
    """
    if name in SCORERS:
        return SCORERS[name]
    module_name, _, function_name = name.rpartition(":" if ":" in name else ".")
    if not module_name or not function_name:
        known = ", ".join(SCORERS)
        raise UserError(
            f"evaluation.scorer: no scorer is called {name!r}; use {known}, or package.module:function"
        )
    applications = str(command_line.ROOT / "pipelines" / "contrib")
    if applications not in sys.path:
        sys.path.append(applications)  # last, so that the user's module of this name comes first
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError) as error:  # TypeError: a relative name
        raise UserError(
            f"evaluation.scorer: {name!r}: cannot import {module_name!r}: {error}"
        ) from error
    except Exception as error:  # the code of the user's module may raise anything
        cause = f"{type(error).__name__}: {error}"
        raise UserError(
            f"evaluation.scorer: {name!r}: importing {module_name!r} fails: {cause}"
        ) from error
    scorer = getattr(module, function_name, None)
    if not callable(scorer):
        raise UserError(
            f"evaluation.scorer: {name!r}: {module_name!r} has no function {function_name!r}"
        )
    return scorer  # type: ignore[no-any-return]


def source_digest(name: str) -> str:
    """Return a digest of the scorer's files: the module in its name, and the module that defines the function.

    Modules that these import are not included. Raises the UserErrors of `resolve`.
    """
    scorer = resolve(name)
    named = name.rpartition(":" if ":" in name else ".")[0]
    modules = [
        sys.modules.get(each)
        for each in (named, getattr(inspect.unwrap(scorer), "__module__", None))
        if each
    ]
    files = [Path(file) for each in modules if (file := getattr(each, "__file__", None))]
    return digest(*(digest_file(file) for file in files if file.is_file()), length=16)


TAKEN = ("loss", "perplexity")
"""Reserved names: a score is reported as eval/NAME, and these are metrics of the held-out rows."""


class Judge:
    """A scorer whose mistakes become UserErrors of one line; creating it raises the UserErrors of `resolve`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._scorer = resolve(name)

    def __call__(self, prediction: str, reference: str) -> dict[str, float]:
        """Return the scores of an answer; raises UserError if the scorer fails, or a score is not a finite number."""
        try:
            raw = self._scorer(prediction, reference)
        except Exception as error:  # the user's function may raise anything
            if isinstance(error, UserError):
                raise
            cause = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"evaluation.scorer: {self.name} fails on the answer {_short(prediction)} and the reference"
                f" {_short(reference)}: {cause}"
            ) from error
        try:
            if not isinstance(raw, Mapping) or not all(
                isinstance(name, str) and name for name in raw
            ):
                raise TypeError
            scores = {name: float(value) for name, value in raw.items()}
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"evaluation.scorer: {self.name} must return {{name: number}}, not {_short(raw)}"
            ) from None
        for name in TAKEN:
            if name in scores:
                raise UserError(
                    f"evaluation.scorer: {self.name} returns a score {name!r}, but eval/{name} is a metric of the"
                    " held-out rows; give the score another name"
                )
        # One value that is not finite would make the mean of all answers useless.
        for name, value in scores.items():
            if not math.isfinite(value):
                raise UserError(
                    f"evaluation.scorer: {self.name} returns {value} as {name!r} for the answer {_short(prediction)}"
                    f" and the reference {_short(reference)}; leave out a score that does not apply"
                )
        return scores

    def tell_partial(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log each score that only some of the answers have."""
        for name, count in Counter(chain.from_iterable(rows)).items():
            if count < len(rows):
                logger.info(
                    f"score {name}: only {count} of {len(rows)} answers have it, and its mean is over these"
                )


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    values_of: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            values_of[name].append(value)
    return {name: sum(values) / len(values) for name, values in values_of.items()}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _json_object(text: str) -> dict[str, object] | None:
    return records.parsed(text, dict[str, object])


def _same(left: object, right: object) -> bool:
    # Compared as JSON text, because true == 1 in Python.
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


# Baseline of a run: loss and answers of the untrained base model, measured once and kept beside the checkpoints.


@dataclass(frozen=True)
class Baseline:
    loss: float | None
    """Mean held-out loss; None without held-out rows."""
    answers: list[list[int]] | None
    """Answers to the held-out prompts, as token ids; None if there are no prompts."""
    means: dict[str, float] | None = None
    """All means of the objective; None in a file of an earlier release."""

    def write(self, path: str, identity: Mapping[str, str]) -> None:
        """Write the baseline; if the storage fails, nothing is raised, and a resumed run measures again."""
        with contextlib.suppress(OSError):
            records.write(path, {"identity": dict(identity), **asdict(self)})

    @classmethod
    def read(cls, path: str, identity: Mapping[str, str], questions: int) -> "Baseline | None":
        """Read the baseline; None if it is missing, damaged, or of another identity or number of questions."""
        kept = None
        with contextlib.suppress(OSError):  # measuring again is better than to end a training
            kept = records.read(path, _Kept)
        if kept is None or kept.identity != identity or len(kept.answers or []) != questions:
            return None
        # A loss that is not finite is measured again, because the measurement raises the error that says why.
        if kept.loss is not None and not math.isfinite(kept.loss):
            return None
        return cls(kept.loss, kept.answers, kept.means)


@dataclass(frozen=True)
class _Kept(Baseline):  # baseline.json
    identity: dict[str, str] = field(kw_only=True)
