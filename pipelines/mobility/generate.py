"""Generate mobility records whose law is known, and with it the best that any model can do.

    python pipelines/mobility/generate.py --out FOLDER [--people 120] [--days 80] [--places 90] [--variety 1.0]
        [--explore 0.6] [--gamma 0.21] [--busy 0.3] [--seed 0]

writes check_ins.csv (for prepare.py --format checkins) and law.csv (for report.py), always the same bytes.

--people   how many, with --days days each
--places   in the town
--variety  factor of the number of favourite places of a person
--explore  and --gamma: the probability of a place that is no favourite is explore / visited^gamma, 1/2 at most
--busy     probability of a stay in each hour from 7 to 23

The docstring of the class Law, in this file, has the formula of the law. law.csv has, for each stay, the place that was
most probable given all before it, and its probability.
"""

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from stays import MINUTES, When

from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.config import command_line

CHECK_INS = ("id", "user_id", "location_id", "start_day", "start_min", "weekday")
LAW = ("user_id", "stay", "best", "chance")
Bump = tuple[float, float, float]
"""Hour, width in hours, height."""


@dataclass(frozen=True)
class Kind:
    """A kind of place: when people go there, on weekdays and at weekends, and how many there are."""

    weekday: tuple[Bump, ...]
    weekend: tuple[Bump, ...]
    places: int
    """Number of such places in a town of 90."""
    favourites: int
    """Number of such favourites of one person, before Settings.variety multiplies it."""


KINDS = {
    "home": Kind(
        ((7, 0.7, 0.5), (19, 2.0, 1.0), (23, 1.5, 2.0)), ((10, 3.0, 0.7), (19, 3.0, 1.0), (23, 2.0, 2.0)), 30, 1
    ),
    "work": Kind(((9, 1.2, 3.0), (14, 1.5, 3.0)), ((10, 2.0, 0.05),), 15, 1),
    "lunch": Kind(((12.5, 0.6, 2.5),), ((13, 1.0, 1.5),), 12, 2),
    "coffee": Kind(((8, 0.6, 1.5), (16, 0.8, 0.4)), ((10, 1.0, 1.0),), 8, 1),
    "gym": Kind(((18, 1.0, 1.5),), ((11, 1.0, 1.2),), 6, 1),
    "shop": Kind(((18, 1.5, 0.7),), ((15, 2.0, 1.8),), 8, 2),
    "bar": Kind(((21, 1.2, 0.8),), ((21, 1.5, 1.5),), 6, 2),
    "park": Kind(((17, 1.5, 0.2),), ((16, 1.5, 0.9),), 5, 1),
}
AFTER = {
    ("coffee", "work"): 3.0,
    ("work", "lunch"): 4.0,
    ("lunch", "work"): 3.0,
    ("gym", "home"): 3.0,
    ("shop", "home"): 3.0,
}
"""Factor of a kind (second) right after another (first)."""
OTHER_DAY = 0.05
"""Factor of a favourite on a weekday that is not its own."""
WITH_DAYS = 0.6
"""Share of the favourites that have weekdays of their own; home and work have none."""
FIRST_PLACE = 10
HOURS = tuple(range(7, 24))
"""At which stays begin."""


@dataclass(frozen=True)
class Settings:
    """The options of the command."""

    people: int = 120
    days: int = 80
    places: int = 90
    variety: float = 1.0
    """Factor of the number of favourites of each kind."""
    explore: float = 0.6
    gamma: float = 0.21
    busy: float = 0.3
    """Probability of a stay in each hour."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UserError for numbers of which nothing can be generated."""
        least = {"people": 1, "days": 1, "places": len(KINDS) * 3, "variety": 0, "explore": 0, "gamma": 0, "busy": 0,
                 "seed": 0}  # fmt: skip
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise UserError(f"argument --{name}: {getattr(self, name):g} is below {bound}")
        if not 0 < self.busy <= 1:
            raise UserError(f"argument --busy: {self.busy:g} is not a probability above 0")


@dataclass(frozen=True)
class Person:
    """One person: favourite places and habits."""

    places: NDArray[np.int64]
    """The favourites, all different."""
    kinds: tuple[str, ...]
    weights: NDArray[np.float64]
    days: NDArray[np.float64]
    """(favourites, 7): 1 on a favourite's own weekdays, OTHER_DAY on others."""
    late: float
    """Hours by which the day of this person is later than others'."""


@dataclass(frozen=True)
class Visit:
    """One generated stay, with what the law said before it."""

    person: int
    day: int
    minute: int
    place: int
    best: int
    """The most probable place."""
    chance: float
    """Its probability, and so that of the best possible answer to be right."""


class Law:
    """The people of a town and the law by which they move; the same settings give the same law.

        p(place | person, weekday, hour, previous) =
            (1 - e) favourite(place) weight(place) curve(kind, hour) day(place, weekday) after(kind, previous) / sum
            + e [place is no favourite] / number of such places            e = min(1/2, explore / visited^gamma)

    A person has favourites of each kind (home, work, lunch ...): the j-th of a kind weighs 1 / (1 + j), and a part of
    them have weekdays of their own. Nobody goes where he is, some kinds often follow others, and other places are
    explored less the more different places have been visited (the exploration of Song et al., "Modelling the scaling
    properties of human mobility", Nature Physics 6, 2010). Because the law is explicit, so is the best possible
    accuracy: whoever knows it names the most probable place, and is right with its probability.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.town = _town(settings.places)
        self.kind_of = {place: kind for kind, places in self.town.items() for place in places}
        rng = np.random.default_rng([settings.seed, 0])
        self.people = tuple(self._person(rng) for _ in range(settings.people))

    def probabilities(self, person: int, when: When, previous: int | None, visited: int) -> dict[int, float]:
        """The probability of each place that may come next.

        `previous` is the place before (None: the first stay), `visited` the number of different places so far.
        """
        one, strength = self.people[person], self._strength(person, when, previous)
        explore = min(0.5, self.settings.explore * max(visited, 1) ** -self.settings.gamma)
        favourites = set(one.places.tolist())
        others = [place for place in self.kind_of if place not in favourites and place != previous]
        known = zip(one.places.tolist(), (strength / strength.sum()).tolist(), strict=True)
        explore = explore if others else 0.0
        return {place: (1 - explore) * share for place, share in known if share} | {
            place: explore / len(others) for place in others
        }

    def _strength(self, person: int, when: When, previous: int | None) -> NDArray[np.float64]:
        """(favourites,) what each favourite weighs, before it is made a probability."""
        one, hour = self.people[person], when.minute // 60
        curves = {kind: _curve(kind, when.weekend, hour - one.late) for kind in KINDS}
        rising = np.array([curves[kind] for kind in one.kinds])
        if previous is not None:
            rising *= [AFTER.get((self.kind_of[previous], kind), 1.0) for kind in one.kinds]
        found: NDArray[np.float64] = one.weights * rising * one.days[:, when.weekday] * (one.places != previous)
        return found

    def _person(self, rng: np.random.Generator) -> Person:
        places, kinds, weights, days = [], [], [], []
        for kind, places_of in self.town.items():
            count = min(max(1, round(KINDS[kind].favourites * self.settings.variety)), len(places_of))
            for number, place in enumerate(rng.choice(places_of, count, replace=False).tolist()):
                places.append(place)
                kinds.append(kind)
                weights.append(1 / (1 + number))
                days.append(_own_days(rng) if kind not in ("home", "work") and rng.random() < WITH_DAYS else np.ones(7))
        late = float(np.clip(rng.normal(), -2, 2))
        return Person(np.array(places), tuple(kinds), np.array(weights), np.array(days), late)


def visits(law: Law) -> Iterator[Visit]:
    """The stays of all people, one person after the other, in the order of time; always the same for a law."""
    for person in range(len(law.people)):
        rng = np.random.default_rng([law.settings.seed, 1, person])
        previous, seen = None, set[int]()
        for day, hour in _hours(law.settings, rng):
            when = When(day % 7, hour * 60 + int(rng.integers(60)))
            chances = law.probabilities(person, when, previous, len(seen))
            best = max(chances, key=chances.__getitem__)
            previous = int(rng.choice(list(chances), p=list(chances.values())))
            seen.add(previous)
            yield Visit(person, day, when.minute, previous, best, chances[best])


def _hours(settings: Settings, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    for day in range(settings.days):
        for hour in HOURS:
            if rng.random() < settings.busy:
                yield day, hour


def _town(places: int) -> dict[str, tuple[int, ...]]:
    """The places of each kind, numbered kind by kind."""
    shares = np.array([kind.places for kind in KINDS.values()])
    counts = np.maximum(2, np.floor(places * shares / shares.sum())).astype(int)
    counts[0] += places - counts.sum()
    ends = (FIRST_PLACE + np.cumsum(counts)).tolist()
    return {kind: tuple(range(end - count, end)) for kind, end, count in zip(KINDS, ends, counts.tolist(), strict=True)}


def _own_days(rng: np.random.Generator) -> NDArray[np.float64]:
    chosen = rng.choice(7, int(rng.integers(2, 5)), replace=False)
    return np.where(np.isin(np.arange(7), chosen), 1.0, OTHER_DAY)


def _curve(kind: str, weekend: bool, hour: float) -> float:
    bumps = KINDS[kind].weekend if weekend else KINDS[kind].weekday
    apart = [(abs(hour - middle) % 24, width, height) for middle, width, height in bumps]
    return 1e-3 + sum(h * math.exp(-0.5 * (min(d, 24 - d) / w) ** 2) for d, w, h in apart)


def main(argv: list[str]) -> None:
    """Write both files."""
    kinds = {field.name: type(field.default) for field in fields(Settings)}
    found = command_line.parse(argv, __doc__ or "", options=("--out", *(f"--{name}" for name in kinds)))
    if found.words or "--out" not in found.options:
        raise UserError("argument --out: missing, or more than options is given; --help shows how")
    changes = {name: _value(found.options, name, kind) for name, kind in kinds.items() if f"--{name}" in found.options}
    law = Law(Settings(**changes))  # type: ignore[arg-type]
    folder = Path(found.options["--out"])
    with as_user_error(f"argument --out: {folder}: cannot be written", OSError, reason=short_reason):
        folder.mkdir(parents=True, exist_ok=True)
        chances = list(_write(folder, law))
    if not chances:
        raise UserError("argument --busy: no stay has come of it; set it, --days or --people higher")
    mean = sum(chances) / len(chances)
    print(f"written: {len(chances)} stays of {len(law.people)} people to {folder}; best possible Acc@1 {mean:.3f}")


def _write(folder: Path, law: Law) -> Iterator[float]:
    """Write the stays one by one; yields the probability of the best answer to each."""
    with (
        (folder / "check_ins.csv").open("w", newline="") as first,
        (folder / "law.csv").open("w", newline="") as second,
    ):
        records, best = (csv.writer(file, lineterminator="\n") for file in (first, second))
        records.writerow(CHECK_INS)
        best.writerow(LAW)
        numbers: dict[int, count[int]] = {}
        minutes: dict[int, int] = {}
        for number, visit in enumerate(visits(law)):
            own = numbers.setdefault(visit.person, count())
            assert visit.day * MINUTES + visit.minute > minutes.get(visit.person, -1)  # prepare.py numbers them alike
            minutes[visit.person] = visit.day * MINUTES + visit.minute
            records.writerow((number, visit.person, visit.place, visit.day, visit.minute, visit.day % 7))
            best.writerow((visit.person, next(own), visit.best, f"{visit.chance:.6f}"))
            yield visit.chance


def _value(options: Mapping[str, str], name: str, kind: type) -> float:
    try:
        value: float = kind(options[f"--{name}"])
    except ValueError:
        raise UserError(f"argument --{name}: expected a number, not {options[f'--{name}']!r}") from None
    return value


if __name__ == "__main__":
    command_line.run(main)
