"""Generate mobility records by a known law, and with them the best result that any model can reach.

    python pipelines/contrib/mobility/generate.py --out FOLDER [--people 120] [--days 80] [--places 90] [--variety 1.0]
        [--explore 0.6] [--gamma 0.21] [--busy 0.3] [--seed 0]

--out      folder for check_ins.csv (for prepare.py --format checkins) and law.csv (for report.py)
--people   number of people; each has records of --days days
--places   number of places in the town
--variety  factor of the number of a person's favourite places
--explore  and --gamma: the probability of a place that is no favourite is explore / visited^gamma, at most 1/2
--busy     probability of a stay in each hour from 7 to 23
--seed     the same options with the same seed write the same bytes

The docstring of the class Law, in this file, has the formula of the law. For each stay, law.csv has the most probable
place after all earlier stays, and its probability.

Exit codes: 0 the records are written; 2 an error that you can fix.
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
"""(hour, width in hours, height)."""


@dataclass(frozen=True)
class Kind:
    """A kind of place: the times of its visits on weekdays and weekends, and the number of such places."""

    weekday: tuple[Bump, ...]
    weekend: tuple[Bump, ...]
    places: int
    """Number of such places in a town of 90 places."""
    favourites: int
    """Number of such favourites per person, before the factor Settings.variety."""


KINDS = {
    "home": Kind(
        ((7, 0.7, 0.5), (19, 2.0, 1.0), (23, 1.5, 2.0)),
        ((10, 3.0, 0.7), (19, 3.0, 1.0), (23, 2.0, 2.0)),
        30,
        1,
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
"""Factor for a kind (second) directly after another (first)."""
OTHER_DAY = 0.05
"""Factor for a favourite on other weekdays than its own."""
WITH_DAYS = 0.6
"""Share of favourites with their own weekdays; home and work have none."""
FIRST_PLACE = 10
HOURS = tuple(range(7, 24))
"""Hours in which stays begin."""


@dataclass(frozen=True)
class Settings:
    people: int = 120
    days: int = 80
    places: int = 90
    variety: float = 1.0
    explore: float = 0.6
    gamma: float = 0.21
    busy: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"people": 1, "days": 1, "places": len(KINDS) * 3, "variety": 0, "explore": 0, "gamma": 0, "busy": 0,
                 "seed": 0}  # fmt: skip
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise UserError(f"argument --{name}: {getattr(self, name):g} is below {bound}")
        if not 0 < self.busy <= 1:
            raise UserError(f"argument --busy: {self.busy:g} is not a probability above 0")


@dataclass(frozen=True)
class Person:
    places: NDArray[np.int64]
    """The favourites, all different."""
    kinds: tuple[str, ...]
    weights: NDArray[np.float64]
    days: NDArray[np.float64]
    """(favourites, 7): 1 on a favourite's own weekdays, OTHER_DAY on others."""
    late: float
    """Hours by which this person's day starts later than others'."""


@dataclass(frozen=True)
class Visit:
    """One generated stay, with the law's prediction for it."""

    person: int
    day: int
    minute: int
    place: int
    best: int
    """The most probable place."""
    chance: float
    """The probability of this place, and so of the best possible answer being right."""


class Law:
    """The people of a town and the law of their movements; the same settings give the same law.

        p(place | person, weekday, hour, previous) =
            (1 - e) favourite(place) weight(place) curve(kind, hour) day(place, weekday) after(kind, previous) / sum
            + e [place is no favourite] / number of such places            e = min(1/2, explore / visited^gamma)

    A person has favourites of each kind (home, work, lunch ...): the j-th of a kind has the weight 1 / (1 + j), and
    some favourites have their own weekdays. Nobody goes to the place where they are. Some kinds often follow others.
    The more different places a person has visited, the rarer is a new one (the exploration of Song et al., "Modelling
    the scaling properties of human mobility", Nature Physics 6, 2010). Because the law is explicit, the best possible
    accuracy is known: the best answer is the most probable place, and it is right with that place's probability.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.town = _town(settings.places)
        self.kind_of = {place: kind for kind, places in self.town.items() for place in places}
        rng = np.random.default_rng([settings.seed, 0])
        self.people = tuple(self._person(rng) for _ in range(settings.people))

    def probabilities(
        self, person: int, when: When, previous: int | None, visited: int
    ) -> dict[int, float]:
        """Return the probability of each place that may come next.

        `previous` is the last place (None: this is the first stay), `visited` the number of different places so far.
        """
        own, strength = self.people[person], self._strength(person, when, previous)
        explore = min(0.5, self.settings.explore * max(visited, 1) ** -self.settings.gamma)
        favourites = set(own.places.tolist())
        others = [place for place in self.kind_of if place not in favourites and place != previous]
        known = zip(own.places.tolist(), (strength / strength.sum()).tolist(), strict=True)
        explore = explore if others else 0.0
        return {place: (1 - explore) * share for place, share in known if share} | {
            place: explore / len(others) for place in others
        }

    def _strength(self, person: int, when: When, previous: int | None) -> NDArray[np.float64]:
        """Return (favourites,): the weight of each favourite, not normalised."""
        own, hour = self.people[person], when.minute // 60
        curves = {kind: _curve(kind, when.weekend, hour - own.late) for kind in KINDS}
        rising = np.array([curves[kind] for kind in own.kinds])
        if previous is not None:
            rising *= [AFTER.get((self.kind_of[previous], kind), 1.0) for kind in own.kinds]
        strength: NDArray[np.float64] = (
            own.weights * rising * own.days[:, when.weekday] * (own.places != previous)
        )
        return strength

    def _person(self, rng: np.random.Generator) -> Person:
        places, kinds, weights, days = [], [], [], []
        for kind, places_of in self.town.items():
            count = min(
                max(1, round(KINDS[kind].favourites * self.settings.variety)), len(places_of)
            )
            for number, place in enumerate(rng.choice(places_of, count, replace=False).tolist()):
                places.append(place)
                kinds.append(kind)
                weights.append(1 / (1 + number))
                days.append(
                    _own_days(rng)
                    if kind not in ("home", "work") and rng.random() < WITH_DAYS
                    else np.ones(7)
                )
        late = float(np.clip(rng.normal(), -2, 2))
        return Person(np.array(places), tuple(kinds), np.array(weights), np.array(days), late)


def visits(law: Law) -> Iterator[Visit]:
    """Yield the stays of all people, person by person in the order of time; the same law gives the same stays."""
    for person in range(len(law.people)):
        # A generator per person, so that more people do not change the stays of the first ones.
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
    shares = np.array([kind.places for kind in KINDS.values()])
    counts = np.maximum(2, np.floor(places * shares / shares.sum())).astype(int)
    counts[0] += places - counts.sum()
    ends = (FIRST_PLACE + np.cumsum(counts)).tolist()
    return {
        kind: tuple(range(end - count, end))
        for kind, end, count in zip(KINDS, ends, counts.tolist(), strict=True)
    }


def _own_days(rng: np.random.Generator) -> NDArray[np.float64]:
    chosen = rng.choice(7, int(rng.integers(2, 5)), replace=False)
    return np.where(np.isin(np.arange(7), chosen), 1.0, OTHER_DAY)


def _curve(kind: str, weekend: bool, hour: float) -> float:
    bumps = KINDS[kind].weekend if weekend else KINDS[kind].weekday
    apart = [(abs(hour - middle) % 24, width, height) for middle, width, height in bumps]
    # 1e-3 keeps every hour possible, so that the weights of all favourites never sum to 0.
    return 1e-3 + sum(h * math.exp(-0.5 * (min(d, 24 - d) / w) ** 2) for d, w, h in apart)


def main(argv: list[str]) -> None:
    kinds = {field.name: type(field.default) for field in fields(Settings)}
    args = command_line.parse(
        argv, __doc__ or "", options=("--out", *(f"--{name}" for name in kinds))
    )
    if args.words or "--out" not in args.options:
        raise UserError(
            "argument --out: missing, or another word is not an option; --help shows how"
        )
    changes = {
        name: _value(args.options, name, kind)
        for name, kind in kinds.items()
        if f"--{name}" in args.options
    }
    law = Law(Settings(**changes))  # type: ignore[arg-type]
    folder = Path(args.options["--out"])
    with as_user_error(
        f"argument --out: {folder}: cannot be written", OSError, reason=short_reason
    ):
        folder.mkdir(parents=True, exist_ok=True)
        chances = list(_write(folder, law))
    if not chances:
        raise UserError(
            "argument --busy: no stay was generated; set --busy, --days or --people higher"
        )
    mean = sum(chances) / len(chances)
    print(
        f"written: {len(chances)} stays of {len(law.people)} people to {folder}; best possible Acc@1 {mean:.3f}"
    )


def _write(folder: Path, law: Law) -> Iterator[float]:
    """Write the stays one by one; yield the probability of the best answer to each."""
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
            # prepare.py sorts stays by time and numbers them, so law.csv must have the same order.
            assert visit.day * MINUTES + visit.minute > minutes.get(visit.person, -1)
            minutes[visit.person] = visit.day * MINUTES + visit.minute
            records.writerow(
                (number, visit.person, visit.place, visit.day, visit.minute, visit.day % 7)
            )
            best.writerow((visit.person, next(own), visit.best, f"{visit.chance:.6f}"))
            yield visit.chance


def _value(options: Mapping[str, str], name: str, number_type: type) -> float:
    try:
        value: float = number_type(options[f"--{name}"])
    except ValueError:
        raise UserError(
            f"argument --{name}: expected a number, not {options[f'--{name}']!r}"
        ) from None
    return value


if __name__ == "__main__":
    command_line.run(main)
