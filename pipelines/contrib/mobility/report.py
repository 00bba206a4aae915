"""Print a model's answers beside simple baselines and, for generated records, the best possible result.

    python pipelines/contrib/mobility/report.py FOLDER ANSWERS.jsonl [--law LAW.csv]

FOLDER         the folder that prepare.py wrote
ANSWERS.jsonl  the answers that pipelines/evaluate.py wrote for FOLDER/test.jsonl, with the scorer
               mobility.answer:next_place
--law          law.csv of generate.py, if generate.py made the records

Each baseline predicts twice: from exactly the stays that the model saw, and from all stays before a target. The widths
of the time kernel are chosen on the stays between training and test. Intervals resample people, not rows.

Exit codes: 0 the table is printed; 2 an error that you can fix.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import answer
import numpy as np
import rows
from numpy.typing import NDArray
from stays import MINUTES, Stay, When

from olora_ray.common.errors import UserError, as_user_error
from olora_ray.common.statistics import Interval, difference
from olora_ray.common.text import aligned, plural
from olora_ray.config import command_line
from olora_ray.evaluation.rows import numbered

KERNEL, MOVING = "time kernel", "time kernel, never the last place"
LEVEL = 0.95
TUNED_ON = 2000
"""Largest number of stays on which a time kernel is chosen."""
NOWHERE = -1
"""The place of an answer that names none."""


def main(argv: list[str]) -> None:
    parsed = command_line.parse(argv, __doc__ or "", options=("--law",))
    names = parsed.names()
    if len(names) != 2:
        raise UserError("arguments: expected FOLDER and ANSWERS.jsonl; --help shows how")
    law = Path(parsed.options["--law"]) if "--law" in parsed.options else None
    print("\n".join(make_report(Path(names[0]), Path(names[1]), law).lines()))


# Simple predictors of the next place, which a model must beat to be worth its cost. Each uses the stays before the
# target and nothing else, so it can predict from exactly the stays that a model sees, or from all earlier ones. Among
# equally good places it names the one visited last.


@dataclass(frozen=True)
class Past:
    """The stays before a target, oldest first, at least one; all arrays are (stays,)."""

    places: NDArray[np.int64]
    minutes: NDArray[np.int64]
    weekend: NDArray[np.bool_]

    @classmethod
    def of(cls, stays: Sequence[Stay]) -> "Past":
        minutes = np.array([stay.when.minute for stay in stays], dtype=np.int64)
        return cls(
            np.array([stay.place for stay in stays]),
            minutes,
            np.array([stay.when.weekend for stay in stays]),
        )

    def __getitem__(self, part: slice) -> "Past":
        return Past(self.places[part], self.minutes[part], self.weekend[part])


Baseline = Callable[[Past, When], int]


def last(past: Past, when: When) -> int:
    return int(past.places[-1])


def most_frequent(past: Past, when: When) -> int:
    return _heaviest(past.places, np.ones(len(past.places)))


def markov(past: Past, when: When) -> int:
    """Return the place that most often followed the last place; if none did, the most frequent place."""
    after = past.places[1:][past.places[:-1] == past.places[-1]]
    return _heaviest(after, np.ones(len(after))) if len(after) else most_frequent(past, when)


@dataclass(frozen=True)
class TimeKernel:
    """The place with the largest sum of weights over past stays: Gaussian in the hours between the times of day."""

    hours: float = 1.0
    """Standard deviation."""
    other_days: float = 0.25
    """Factor for weekdays if the target is at the weekend, and the reverse."""
    moving: bool = False
    """Never name the last place, if there is another: a rule that not everybody would call simple."""

    def __call__(self, past: Past, when: When) -> int:
        if self.moving and (elsewhere := past.places != past.places[-1]).any():
            past = Past(past.places[elsewhere], past.minutes[elsewhere], past.weekend[elsewhere])
        apart = np.abs(past.minutes - when.minute)
        hours = np.minimum(apart, MINUTES - apart) / 60
        exponent = -0.5 * (hours / self.hours) ** 2
        exponent += np.where(past.weekend == when.weekend, 0.0, math.log(self.other_days))
        # Without the largest exponent all weights could underflow to 0.
        return _heaviest(past.places, np.exp(exponent - exponent.max()))


BASELINES: dict[str, Baseline] = {
    "last": last,
    "most frequent": most_frequent,
    "Markov-1": markov,
    "time kernel": TimeKernel(),
}
GRID = tuple(
    TimeKernel(hours, other_days)
    for hours in (0.5, 1.0, 2.0, 4.0)
    for other_days in (0.05, 0.25, 1.0)
)
"""Candidates for the time kernel; the best on other rows is used, so that the baseline is strong."""


def _heaviest(places: NDArray[np.int64], weights: NDArray[np.float64]) -> int:
    """Return the place with the largest sum of weights; among equal ones the last visited."""
    names, place = np.unique(places, return_inverse=True)
    sums = np.bincount(place, weights)
    best = np.flatnonzero(np.isclose(sums, sums.max(), rtol=1e-9, atol=0))
    return int(names[place[np.flatnonzero(np.isin(place, best))[-1]]])


# The model and the baselines on the same rows. Paired intervals compare their accuracies. They resample people and not
# rows, because the rows of one person are similar.


@dataclass(frozen=True)
class Asked:
    person: str
    stay: int
    """Index of the target among the person's stays."""
    shown: int
    """Number of stays in the question."""


@dataclass(frozen=True)
class Predictor:
    name: str
    sees: str
    places: tuple[int, ...]
    simple: bool = True
    """True for the simple baselines that a model must beat."""


@dataclass(frozen=True)
class Best:
    """The best possible answers, by the law that generated the rows."""

    places: tuple[int, ...]
    chances: tuple[float, ...]
    """Probability of each answer being right."""


@dataclass(frozen=True)
class Report:
    asked: Sequence[Asked]
    truth: tuple[int, ...]
    model: Predictor
    baselines: Sequence[Predictor]
    best: Best | None

    @cached_property
    def groups(self) -> list[int]:
        return numbered([row.person for row in self.asked])

    def of_several(self) -> bool:
        """True if the rows are of more than one person; for one person there is no interval over people."""
        return len(set(self.groups)) > 1

    def accuracy(self, places: Sequence[int]) -> float:
        """Return Acc@1: the share of rows whose place is named."""
        return float(np.mean(np.equal(places, self.truth)))

    def weighted_f1(self, places: Sequence[int]) -> float:
        """Return the mean F1 of the places that occur, weighted by their counts."""
        needs = "weighted F1 needs scikit-learn: pip install 'olora-ray[mobility]'"
        with as_user_error(needs, ImportError):
            from sklearn.metrics import f1_score  # type: ignore[import-untyped]  # a second

        return float(f1_score(self.truth, places, average="weighted", zero_division=0))

    def over(self, other: Predictor, level: float = LEVEL) -> Interval:
        """Return the model's Acc@1 minus another's, with an interval over people."""
        ours, theirs = (
            np.equal(each.places, self.truth).astype(float) for each in (self.model, other)
        )
        return difference(ours, theirs, level=level, groups=self.groups)

    def lines(self) -> list[str]:
        table = [("", "sees", "Acc@1", "weighted F1", "model minus it", "95% interval over people")]
        table.append((self.model.name, self.model.sees, *self._scores(self.model.places), "", ""))
        for each in self.baselines:
            gain = self.over(each)
            interval = (
                f"[{gain.low:+.3f}, {gain.high:+.3f}]" if self.of_several() else "one person: none"
            )
            table.append(
                (each.name, each.sees, *self._scores(each.places), f"{gain.mean:+.3f}", interval)
            )
        if self.best:
            table.append(("best possible", "the law", *self._scores(self.best.places), "", ""))
        shown = aligned(table, right=[number > 1 for number in range(6)])
        people = f"{len(set(self.groups))} people" if self.of_several() else "one person"
        size = f"{plural(len(self.truth), 'row')} of {people}"
        return [size, "", shown[0], "-" * len(shown[0]), *shown[1:], "", *self.verdict()]

    def verdict(self) -> list[str]:
        """Return sentences: does the model beat the best simple baseline, and the other rule?"""
        simple = [each for each in self.baselines if each.simple]
        strongest = [max(simple, key=lambda each: self.accuracy(each.places))]
        others = [each for each in self.baselines if not each.simple]
        strongest += [max(others, key=lambda each: self.accuracy(each.places))] if others else []
        lines = [self._against(each) for each in strongest]
        if self.best:
            expected, reached = float(np.mean(self.best.chances)), self.accuracy(self.model.places)
            right = self.accuracy(self.best.places)
            lines.append(
                f"The best possible Acc@1 is {expected:.3f} on average and {right:.3f} on these rows; the model's is"
                f" {reached:.3f}."
            )
        return lines

    def _against(self, other: Predictor) -> str:
        rule = "the best simple baseline" if other.simple else "the best of the other rules"
        rival, unclear = (
            f"{rule} ({other.name} on {other.sees})",
            "These rows do not show that the model beats",
        )
        gain = self.over(other)
        if not self.of_several():
            return f"{unclear} {rival}: Acc@1 {gain.mean:+.3f}, but all rows are of one person."
        bounds = f"{gain.mean:+.3f} (95% interval over people: {gain.low:+.3f} to {gain.high:+.3f})"
        # The baseline was chosen on these rows, so the best of several looks better than it is. To say that the model
        # loses, the interval must hold for all of them together (Bonferroni).
        alike = sum(each.simple == other.simple for each in self.baselines)
        loses = gain.high < 0 and self.over(other, 1 - (1 - LEVEL) / alike).high < 0
        word = "The model beats" if gain.low > 0 else "The model loses to" if loses else unclear
        return f"{word} {rival}: Acc@1 {bounds}."

    def _scores(self, places: Sequence[int]) -> tuple[str, str]:
        return f"{self.accuracy(places):.3f}", f"{self.weighted_f1(places):.3f}"


def make_report(folder: Path, answers: Path, law: Path | None = None) -> Report:
    """Return the report on the answers to FOLDER/test.jsonl in `answers` (answers.jsonl of pipelines/evaluate.py).

    Raises UserError for files that are missing or do not fit together.
    """
    people = rows.read_stays(folder)
    given = _answers(answers)
    asked = _asked(folder / "test.jsonl", given, people)
    truth = tuple(people[row.person][row.stay].place for row in asked)
    places = tuple(given[line][0] for line in sorted(given))
    model = Predictor("model", "stays shown", places, simple=False)
    return Report(asked, truth, model, baselines(people, asked), _best(law, asked) if law else None)


def baselines(people: Mapping[str, Sequence[Stay]], asked: Sequence[Asked]) -> list[Predictor]:
    """Return each simple baseline on exactly the stays that the model saw, and on all stays before the target."""
    pasts = {person: Past.of(stays) for person, stays in people.items()}
    # A baseline that sees as many stays as the model is a fair rival; one that sees all shows the worth of more stays.
    shown = max(1, *(row.shown for row in asked), 1)
    predictors = []
    for sees, most in (("stays shown", shown), ("full past", None)):
        kernel = _tuned(people, pasts, most)
        chosen: dict[str, Baseline] = {
            **BASELINES,
            KERNEL: kernel,
            MOVING: replace(kernel, moving=True),
        }
        for name, baseline in chosen.items():
            targets = [(row.person, row.stay, max(1, row.shown) if most else None) for row in asked]
            guesses = _predict(baseline, people, pasts, targets)
            predictors.append(Predictor(name, sees, guesses, simple=name != MOVING))
    return predictors


def _predict(
    baseline: Baseline,
    people: Mapping[str, Sequence[Stay]],
    pasts: Mapping[str, Past],
    targets: Iterable[tuple[str, int, int | None]],
) -> tuple[int, ...]:
    """Return predictions for (person, index of a stay, number of earlier stays that are seen; None: all)."""
    # Nothing comes before a first stay (`prepare.py --least 0`), so no baseline names a place for it.
    return tuple(
        baseline(
            pasts[person][max(0, stay - most) if most else 0 : stay], people[person][stay].when
        )
        if stay
        else NOWHERE
        for person, stay, most in targets
    )


def _tuned(
    people: Mapping[str, Sequence[Stay]], pasts: Mapping[str, Past], most: int | None
) -> TimeKernel:
    # The stays between training and test, so that the choice uses neither.
    middle = rows.select(people, 1, {"eval": TUNED_ON}).targets["eval"]
    if not middle:
        return GRID[0]
    targets = [(target.person, target.number, most) for target in middle]
    truth = [people[target.person][target.number].place for target in middle]
    return max(
        GRID,
        key=lambda kernel: float(
            np.mean(np.equal(_predict(kernel, people, pasts, targets), truth))
        ),
    )


def _answers(file: Path) -> dict[int, tuple[int, int | None]]:
    """Return line of a row -> the answered place (NOWHERE for none) and the reference's."""
    given: dict[int, tuple[int, int | None]] = {}
    for number, item in enumerate(_lines(file), 1):
        with as_user_error(
            f"{file}:{number}: not a line of answers.jsonl",
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
        ):
            name, _, line = item["origin"].rpartition(":")
            place, reference = answer.read(item["text"]), answer.read(item["reference"])
            if int(line) in given:
                raise UserError(
                    f"{file}:{number}: {name}:{line} was answered before; use the answers of one model"
                )
            given[int(line)] = (NOWHERE if place is None else place, reference)
    if not given:
        raise UserError(f"{file}: no answers; evaluate with a scorer, and evaluation.rows above 0")
    return dict(sorted(given.items()))


def _asked(
    file: Path, given: Mapping[int, tuple[int, int | None]], people: Mapping[str, Sequence[Stay]]
) -> tuple[Asked, ...]:
    asked = []
    for number, row in enumerate(_lines(file), 1):
        if number not in given:
            continue
        with as_user_error(
            f"{file}:{number}: not a row that prepare.py wrote",
            KeyError,
            TypeError,
            ValueError,
            IndexError,
        ):
            answered = Asked(row["user"], int(row["stay"]), int(row["shown"]))
            place = people[answered.person][answered.stay].place
        if place != given[number][1]:
            raise UserError(
                f"{file}:{number}: the answers are to other rows: evaluate on this file"
            )
        asked.append(answered)
    if len(asked) < len(given):
        raise UserError(
            f"{file}: the answers are for {len(given)} rows, and it has only {len(asked)} of them"
        )
    return tuple(asked)


def _best(file: Path, asked: Sequence[Asked]) -> Best:
    known: dict[tuple[str, int], tuple[int, float]] = {}
    with as_user_error(
        f"{file}: not written by generate.py, or changed later",
        OSError,
        ValueError,
        KeyError,
        TypeError,
        csv.Error,
    ):
        with file.open(encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                known[row["user_id"], int(row["stay"])] = (int(row["best"]), float(row["chance"]))
        best = [known[row.person, row.stay] for row in asked]
    return Best(tuple(place for place, _ in best), tuple(chance for _, chance in best))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with as_user_error(f"{file}", OSError, ValueError), file.open(encoding="utf-8") as opened:
        for number, line in enumerate(opened, 1):
            with as_user_error(f"{file}:{number}", ValueError):
                yield json.loads(line)


if __name__ == "__main__":
    command_line.run(main)
