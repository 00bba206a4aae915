"""Stays: a person was at a place from some time on. All mobility records become stays of people.

Every record counts. A record that cannot be used stops the reading with its file and line, before anything is written.
Repairs are asked for by name (REPAIRS), counted, and printed.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from olora_ray.common.errors import UserError
from olora_ray.common.text import plural

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MINUTES = 24 * 60
LARGEST_PLACE = 2**31 - 1
"""The largest number that a place may have."""
BROKEN, UNSORTED, DUPLICATES = "broken", "unsorted", "duplicates"
REPAIRS = {
    BROKEN: "left out",
    UNSORTED: "sorted by time",
    DUPLICATES: "left out",
}
"""Fault of a record -> its repair, if it is asked for."""


@dataclass(frozen=True, slots=True)
class When:
    """The local time at which a stay begins: all that is known about a stay that is to be predicted."""

    weekday: int
    """0 (Monday) to 6."""
    minute: int

    @property
    def weekend(self) -> bool:
        return self.weekday >= 5


@dataclass(frozen=True, slots=True)
class Stay:
    place: int
    at: int
    """Time in minutes, which orders the stays of one person."""
    when: When
    duration: int | None = None
    """Minutes; None if unknown, as for a check-in."""
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)
    """Line of the record, from 1."""


@dataclass
class Repairs:
    """Faults that are repaired, and how many were."""

    wanted: Collection[str] = ()
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for name in self.wanted:
            if name not in REPAIRS:
                raise UserError(
                    f"argument --repair: {name!r} is unknown; use one of {', '.join(REPAIRS)}"
                )

    def found(self, fault: str, file: str, line: int, reason: str) -> None:
        """Count a fault; raises UserError that names the line if its repair was not asked for."""
        if fault not in self.wanted:
            raise UserError(
                f"{file}:{line}: {reason}; correct it, or set --repair {fault} ({REPAIRS[fault]})"
            )
        self.counts[fault] += 1

    def lines(self) -> list[str]:
        return [
            f"{plural(count, 'record')} {fault}: {REPAIRS[fault]}"
            for fault, count in self.counts.items()
        ]


Named = tuple[str, str, Stay]
"""Name of a person, name of the place, and the stay; `Stay.place` counts only if the place has no name."""


@dataclass(frozen=True)
class Records:
    people: dict[str, list[Stay]]
    """Name of a person -> stays, oldest first; people in the order of their names, numbers before words."""
    places: dict[str, int]
    """Name of a place -> its number (see `numbered`); empty if the records have numbers."""

    def __len__(self) -> int:
        return sum(map(len, self.people.values()))


def collect(named: Iterator[Named], repairs: Repairs) -> Records:
    """Return the stays of each person, from records in any order of people.

    Raises UserError for unsorted records and duplicates that are not to be repaired, and if there are no records.
    """
    named_stays: dict[str, list[tuple[str, Stay]]] = {}
    for person, place, stay in named:
        named_stays.setdefault(person, []).append((place, stay))
    if not named_stays:
        raise UserError(
            "argument RECORDS: no usable record in these files; name other files, or see --format"
        )
    places = numbered({place for stays in named_stays.values() for place, _ in stays if place})
    people: dict[str, list[Stay]] = {}
    for person in sorted(named_stays, key=_natural):
        stays = [
            replace(stay, place=places[place]) if place else stay
            for place, stay in named_stays.pop(person)
        ]
        people[person] = _distinct(_ordered(stays, person, repairs), person, repairs)
    return Records(people, places)


def numbered(names: Collection[str]) -> dict[str, int]:
    """Return numbers from 1 on for places, in an order that shows nothing about them."""
    # Not by first appearance: then a new place would always have the next number, and a model could count.
    order = sorted(names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=16).digest())
    return {name: number for number, name in enumerate(order, 1)}


def _ordered(stays: list[Stay], person: str, repairs: Repairs) -> list[Stay]:
    for before, stay in pairwise(stays):
        if stay.at < before.at:
            reason = f"person {person}: the time is earlier than in the record at {before.file}:{before.line}"
            repairs.found(UNSORTED, stay.file, stay.line, reason)
    return sorted(stays, key=lambda stay: stay.at)


def _distinct(stays: list[Stay], person: str, repairs: Repairs) -> list[Stay]:
    # Of stays with the same time and place the first one is kept.
    seen: dict[tuple[int, int], Stay] = {}
    for stay in stays:
        first = seen.setdefault((stay.at, stay.place), stay)
        if first is not stay:
            reason = f"person {person}: the same time and place as the record at {first.file}:{first.line}"
            repairs.found(DUPLICATES, stay.file, stay.line, reason)
    return list(seen.values())


def _natural(name: str) -> tuple[bool, int, str]:
    return (False, int(name), name) if name.isascii() and name.isdigit() else (True, 0, name)
