"""Rows of a mobility corpus: the stays to train on, to choose on and to test on, and the files that record them.

Each person's stays are split by time: the first 60 % are targets of training, the next 20 % are held out for choices,
the last 20 % for the result. A target's question may show all earlier stays, as it will when it is served.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt import Fits, Template
from stays import Records, Stay, When

from olora_ray.common.errors import as_user_error
from olora_ray.common.text import plural

SPLITS = ("train", "eval", "test")
SHARES = (0.6, 0.8)
STAYS, PLACES, TEMPLATE = "stays.csv", "places.csv", "template.json"
COLUMNS = ("user", "place", "at", "weekday", "minute", "duration")


@dataclass(frozen=True)
class Target:
    person: str
    number: int
    """Index of the stay among the person's stays."""
    count: int = 1
    """Number of stays that the row asks for, starting at this one."""


@dataclass(frozen=True)
class Selection:
    targets: Mapping[str, Sequence[Target]]
    """train, eval and test -> targets, person by person in the order of time."""
    too_early: int
    """Number of stays with fewer than `least` earlier ones."""
    not_drawn: Mapping[str, int]
    """Number of stays of each split beyond its limit."""


def split_of(number: int, count: int) -> str:
    """Return the split of stay `number`, from 0, among the `count` stays of a person."""
    return SPLITS[sum(number >= int(share * count) for share in SHARES)]


def select(
    people: Mapping[str, Sequence[Stay]],
    least: int,
    limits: Mapping[str, int] | None = None,
    seed: int = 0,
    turns: int = 1,
) -> Selection:
    """Return the targets of each split: all stays with at least `least` earlier ones, or as many rows as its limit.

    A hash of seed, person and number draws the rows, so that the order of the records does not matter. A row of train
    asks for up to `turns` stays, one after the other.
    """
    targets_of: dict[str, list[Target]] = {name: [] for name in SPLITS}
    for person, stays in people.items():
        splits = [split_of(number, len(stays)) for number in range(len(stays))]
        ends = {name: len(stays) - splits[::-1].index(name) for name in set(splits)}
        number = least
        while number < len(stays):
            name = splits[number]
            count = min(turns if name == "train" else 1, ends[name] - number)
            targets_of[name].append(Target(person, number, count))
            number += count
    kept = {
        name: _drawn(targets, (limits or {}).get(name), seed)
        for name, targets in targets_of.items()
    }
    return Selection(
        kept,
        sum(min(least, len(stays)) for stays in people.values()),
        {name: len(targets_of[name]) - len(kept[name]) for name in SPLITS},
    )


def write(
    folder: Path, records: Records, selection: Selection, template: Template, fits: Fits | None
) -> list[str]:
    """Write train.jsonl, eval.jsonl and test.jsonl, all stays, the names of the places and the template.

    Rows are written one by one; the files get their names when all are complete. Returns lines about the written files.
    Raises UserError if a question does not fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cut: Counter[str] = Counter()
    for name in SPLITS:
        with _part(folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as out:
            for target in selection.targets[name]:
                row = _row(records, target, template, fits)
                cut[name] += row["shown"] < min(target.number, template.history + template.context)
                out.write(json.dumps(row) + "\n")
    _table(_part(folder / STAYS), COLUMNS, _cells(records))
    _table(
        _part(folder / PLACES),
        ("location_id", "name"),
        [(n, name) for name, n in records.places.items()],
    )
    template.save(_part(folder / TEMPLATE))
    for name in (*(f"{split}.jsonl" for split in SPLITS), STAYS, PLACES, TEMPLATE):
        _part(folder / name).replace(folder / name)
    return [_line(name, selection, cut[name]) for name in SPLITS]


def read_stays(folder: Path) -> dict[str, list[Stay]]:
    """Return each person's stays from the file of `write`; raises UserError if it is missing or another file."""
    people: dict[str, list[Stay]] = {}
    message = f"{folder / STAYS}: not written by prepare.py, or changed later"
    with (
        as_user_error(message, OSError, ValueError, KeyError, TypeError, csv.Error),
        (folder / STAYS).open(encoding="utf-8") as opened,
    ):
        for row in csv.DictReader(opened):
            place, at, weekday, minute = (int(row[name]) for name in COLUMNS[1:5])
            duration = int(row["duration"]) if row["duration"] else None
            people.setdefault(row["user"], []).append(
                Stay(place, at, When(weekday, minute), duration)
            )
    return people


def _row(records: Records, target: Target, template: Template, fits: Fits | None) -> dict[str, Any]:
    stays = records.people[target.person]
    past, asked = stays[: target.number], stays[target.number : target.number + target.count]
    shown = template.room(past, asked[0].when, fits, template.turns(asked)[:-1])
    messages = template.example(past[len(past) - shown :], *asked)
    return {"messages": messages, "user": target.person, "stay": target.number, "shown": shown}


def _cells(records: Records) -> Iterator[tuple[object, ...]]:
    for person, stays in records.people.items():
        for stay in stays:
            yield person, stay.place, stay.at, stay.when.weekday, stay.when.minute, stay.duration


def _drawn(targets: Sequence[Target], limit: int | None, seed: int) -> list[Target]:
    if limit is None or len(targets) <= limit:
        return list(targets)
    # Drawn by hash, then returned in their own order, person by person.
    chosen = set(sorted(targets, key=lambda target: _hash(seed, target))[:limit])
    return [target for target in targets if target in chosen]


def _hash(seed: int, target: Target) -> bytes:
    return hashlib.blake2b(
        json.dumps([seed, target.person, target.number]).encode(), digest_size=16
    ).digest()


def _line(name: str, selection: Selection, cut: int) -> str:
    targets = selection.targets[name]
    people = len({target.person for target in targets})
    parts = [f"{name}: {plural(len(targets), 'row')} of {people} people"]
    asked = sum(target.count for target in targets)
    parts += [f"which ask for {asked} stays"] if asked > len(targets) else []
    parts += [f"{left} more were not drawn"] if (left := selection.not_drawn[name]) else []
    parts += [f"{cut} without their oldest stays, which did not fit"] if cut else []
    return ", ".join(parts)


def _part(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def _table(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([header, *rows])
