"""Scorers of generated answers: of one answer, or of all answers together.

A scorer of one answer maps (prediction, reference) to named scores in [0, 1]. It may leave out a score that does not
apply to an answer; the mean is over the answers that have it. A scorer of all answers has one parameter, the list of
rows, and returns named numbers that are no means over rows, such as macro F1; more is better.
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
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from olora_ray.common import records
from olora_ray.common.errors import UserError, first_line
from olora_ray.common.storage import digest, digest_file
from olora_ray.common.text import plural, shortened
from olora_ray.config import command_line

logger = logging.getLogger(__name__)

Scorer = Callable[[str, str], dict[str, float]]
Row = Mapping[str, str]
"""An answered row: its prompt, reference and answer."""
Metric = Callable[[Sequence[Row]], Mapping[str, float]]


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


def macro_f1(rows: Sequence[Row]) -> dict[str, float]:
    """Return the mean of the F1 of all labels among the references. Each label has the same weight."""
    wanted = [row["reference"].strip() for row in rows]
    given = [row["answer"].strip() for row in rows]
    hits = Counter(label for label, answer in zip(wanted, given, strict=True) if label == answer)
    sizes = Counter(wanted)
    answers = Counter(given)
    # Not scikit-learn's: a bootstrap takes a thousand of them, and this one is fifty times as fast.
    values = [2 * hits[label] / (size + answers[label]) for label, size in sizes.items()]
    return {"macro_f1": sum(values) / len(values)}


SCORERS: dict[str, Scorer] = {"exact_match": exact_match, "json_fields": json_fields}
OVER_ALL: dict[str, Metric] = {"macro_f1": macro_f1}


def names_in(scorer: str) -> list[str]:
    """Return the names in evaluation.scorer, which has commas between several."""
    return [name.strip() for name in scorer.split(",")]


def built_in(scorer: str) -> bool:
    return all(name in SCORERS or name in OVER_ALL for name in names_in(scorer))


def resolve(name: str) -> Callable[..., Any]:
    """Return one scorer: a built-in one, `package.module:function` or `package.module.function`.

    Imports the module, so its code runs. It may be one of pipelines/contrib: `mobility.answer:next_place`. Raises
    UserError if there is no such function.
    """
    known: dict[str, Callable[..., Any]] = {**SCORERS, **OVER_ALL}
    if name in known:
        return known[name]
    module_name, _, function_name = name.rpartition(":" if ":" in name else ".")
    if not module_name or not function_name:
        raise UserError(
            f"evaluation.scorer: no scorer is called {name!r}; use {', '.join(known)}, or package.module:function"
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


def _takes_all(function: Callable[..., Any]) -> bool:
    """Return True if a scorer takes all rows together: it has one parameter."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # some functions in C have no signature
        return False
    return len(parameters) == 1 and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL


def source_digest(scorer: str) -> str:
    """Return a digest of the scorers' files: the modules in their names, and the modules that define the functions.

    Modules that these import are not included. Raises the UserErrors of `resolve`.
    """
    files = []
    for name in names_in(scorer):
        named = name.rpartition(":" if ":" in name else ".")[0]
        defines = getattr(inspect.unwrap(resolve(name)), "__module__", None)
        for module in (named, defines):
            file = getattr(sys.modules.get(module or ""), "__file__", None)
            if file and Path(file).is_file():
                files.append(digest_file(Path(file)))
    return digest(*files, length=16)


TAKEN = ("loss", "perplexity")
"""Reserved names: a score is reported as eval/NAME, and these are metrics of the held-out rows."""


class Judge:
    """Scorers whose mistakes become UserErrors of one line; creating it raises the UserErrors of `resolve`.

    Without a scorer of one answer, exact_match is that.
    """

    def __init__(self, scorer: str) -> None:
        self._each: dict[str, Scorer] = {}
        self._over_all: dict[str, Metric] = {}
        for name in names_in(scorer):
            function = resolve(name)
            if _takes_all(function):
                self._over_all[name] = function
            else:
                self._each[name] = function
        if not self._each:
            self._each["exact_match"] = exact_match

    @property
    def takes_all(self) -> bool:
        """True if there is a scorer of all answers."""
        return bool(self._over_all)

    def __call__(self, prediction: str, reference: str) -> dict[str, float]:
        """Return the scores of an answer; raises UserError if a scorer fails, or a score is not a finite number."""
        scores: dict[str, float] = {}
        on = f"the answer {_short(prediction)} and the reference {_short(reference)}"
        for name, scorer in self._each.items():
            scores |= _checked(name, partial(scorer, prediction, reference), on)
        return scores

    def over_all(self, rows: Sequence[Row]) -> dict[str, float]:
        """Return the numbers of all answers together; raises as a call. {} without such a scorer, or without rows."""
        numbers: dict[str, float] = {}
        if rows:
            for name, metric in self._over_all.items():
                numbers |= _checked(name, partial(metric, rows), plural(len(rows), "row"))
        return numbers

    def number(self, name: str, rows: Sequence[Row]) -> float:
        """Return one of these numbers; NaN if it is not among them."""
        return self.over_all(rows).get(name, math.nan)

    def tell_partial(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log each score that only some of the answers have."""
        for name, count in Counter(chain.from_iterable(rows)).items():
            if count < len(rows):
                logger.info(
                    f"score {name}: only {count} of {len(rows)} answers have it, and its mean is over these"
                )


def _checked(name: str, score: Callable[[], object], on: str) -> dict[str, float]:
    """Return the numbers of the scorer `name`; `on` says in messages what it was called with."""
    try:
        raw = score()
    except Exception as error:  # the user's function may raise anything
        if isinstance(error, UserError):
            raise
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"evaluation.scorer: {name} fails on {on}: {cause}") from error
    try:
        if not isinstance(raw, Mapping) or not all(isinstance(key, str) and key for key in raw):
            raise TypeError
        scores = {key: float(value) for key, value in raw.items()}
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"evaluation.scorer: {name} must return {{name: number}}, not {_short(raw)}"
        ) from None
    for key, value in scores.items():
        if key in TAKEN:
            raise UserError(
                f"evaluation.scorer: {name} returns a score {key!r}, but eval/{key} is a metric of the held-out rows;"
                " give the score another name"
            )
        # One value that is not finite would make the mean of all answers useless.
        if not math.isfinite(value):
            raise UserError(
                f"evaluation.scorer: {name} returns {value} as {key!r} for {on}; leave out a score that does not apply"
            )
    return scores


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    values_of: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            values_of[name].append(value)
    return {name: sum(values) / len(values) for name, values in values_of.items()}


def _short(value: object) -> str:
    return shortened(repr(value), 80)


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
