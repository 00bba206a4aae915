"""Stays: a person was at a place from some time on. All records of mobility become the stays of each person.

Every record is accounted for. A record that cannot be used stops the reading with its file and line, before anything
is made of the others. What may be put right instead is asked for by name (REPAIRS), counted, and said.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice, pairwise

from olora_ray.common.errors import UserError
from olora_ray.common.text import plural

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MINUTES = 24 * 60
"""Minutes of a day."""
LARGEST_PLACE = 2**31 - 1
"""No place of a record has a larger number."""
BROKEN, UNSORTED, DUPLICATES = "broken", "unsorted", "duplicates"
REPAIRS = {
    BROKEN: "left out",
    UNSORTED: "put in the order of time",
    DUPLICATES: "left out",
}
"""Fault of a record -> its repair, where that is asked for."""
MANY = 20
"""Places, of fewer than which the order of their numbers says nothing."""


@dataclass(frozen=True, slots=True)
class When:
    """The local time at which a stay begins: all that is known of a stay that is to be predicted."""

    weekday: int
    """0 (Monday) to 6."""
    minute: int
    """Minute of the day, 0 to 1439."""

    @property
    def weekend(self) -> bool:
        """True on Saturdays and Sundays."""
        return self.weekday >= 5


@dataclass(frozen=True, slots=True)
class Stay:
    """One stay of a person."""

    place: int
    at: int
    """Minutes by which the stays of one person are ordered."""
    when: When
    duration: int | None = None
    """Minutes; None: unknown, as for a check-in."""
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)
    """Where the record stands, from 1."""


@dataclass
class Repairs:
    """Which faults of records are put right, and how many were."""

    wanted: Collection[str] = ()
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Raise UserError for a fault that there is not."""
        for name in self.wanted:
            if name not in REPAIRS:
                raise UserError(f"argument --repair: {name!r} is not known; there are {', '.join(REPAIRS)}")

    def found(self, fault: str, file: str, line: int, reason: str) -> None:
        """Count a fault; raises UserError that names the line unless its repair is wanted."""
        if fault not in self.wanted:
            raise UserError(f"{file}:{line}: {reason}; correct it, or --repair {fault}: {REPAIRS[fault]}, and counted")
        self.counts[fault] += 1

    def lines(self) -> list[str]:
        """Return a line for each fault that was repaired."""
        return [f"{plural(count, 'record')} {fault}: {REPAIRS[fault]}" for fault, count in self.counts.items()]


Named = tuple[str, str, Stay]
"""Name of a person, name of the place, and the stay; `Stay.place` counts only where the name of the place is empty."""


@dataclass(frozen=True)
class Records:
    """All that was read."""

    people: dict[str, list[Stay]]
    """Name of a person -> stays, oldest first; people in the order of their names, numbers before words."""
    places: dict[str, int]
    """Name of a place -> its number (see `numbered`); empty where the records have numbers."""

    def __len__(self) -> int:
        return sum(map(len, self.people.values()))

    def counted(self) -> bool:
        """True if most places have the number after the highest before them: a model that counts can name new ones."""
        order = dict.fromkeys(stay.place for stays in self.people.values() for stay in stays)
        following = sum(
            place == highest + 1 for place, highest in zip(islice(order, 1, None), accumulate(order, max), strict=False)
        )
        return len(order) > MANY and following > len(order) / 2


def collect(named: Iterator[Named], repairs: Repairs) -> Records:
    """Return the stays of each person, from records in any order of people.

    Raises UserError for what is unsorted or there twice, unless that is to be repaired, and if there is nothing.
    """
    found: dict[str, list[tuple[str, Stay]]] = {}
    for person, place, stay in named:
        found.setdefault(person, []).append((place, stay))
    if not found:
        raise UserError("argument RECORDS: no record is there that can be used")
    places = numbered({place for stays in found.values() for place, _ in stays if place})
    people: dict[str, list[Stay]] = {}
    for person in sorted(found, key=_natural):
        stays = [replace(stay, place=places[place]) if place else stay for place, stay in found.pop(person)]
        people[person] = _distinct(_ordered(stays, person, repairs), person, repairs)
    return Records(people, places)


def numbered(names: Collection[str]) -> dict[str, int]:
    """Numbers from 1 on for places, in an order that says nothing of them.

    By first appearance a place where nobody has been yet would have the next number: whoever counts would know it.
    """
    order = sorted(names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=16).digest())
    return {name: number for number, name in enumerate(order, 1)}


def _ordered(stays: list[Stay], person: str, repairs: Repairs) -> list[Stay]:
    for before, stay in pairwise(stays):
        if stay.at < before.at:
            what = f"person {person}: the time lies before that of the record at {before.file}:{before.line}"
            repairs.found(UNSORTED, stay.file, stay.line, what)
    return sorted(stays, key=lambda stay: stay.at)


def _distinct(stays: list[Stay], person: str, repairs: Repairs) -> list[Stay]:
    """The stays without those of the same time and place; the first of them stays."""
    seen: dict[tuple[int, int], Stay] = {}
    for stay in stays:
        first = seen.setdefault((stay.at, stay.place), stay)
        if first is not stay:
            what = f"person {person}: the same time and place as the record at {first.file}:{first.line}"
            repairs.found(DUPLICATES, stay.file, stay.line, what)
    return list(seen.values())


def _natural(name: str) -> tuple[bool, int, str]:
    return (False, int(name), name) if name.isascii() and name.isdigit() else (True, 0, name)
