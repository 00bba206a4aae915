"""Processed check-ins as csv, the form that LLM-Mob (2308.15197) and MoBLLM (2503.16553) start from.

    id,user_id,location_id,latitude,longitude,start_day,start_min,weekday                    Foursquare
    id,user_id,location_id,duration,start_day,end_day,start_min,end_min,weekday              Geolife

Columns are found by their names in the first line; of these, user_id, location_id, start_day, start_min and weekday
are needed, and duration is used where it is there. start_day counts days from any day, start_min minutes from
midnight, weekday from 0 (Monday), duration minutes.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from olora_ray.common.errors import UserError
from olora_ray.data.mobility.records import BROKEN, Broken, Named, Repairs, number
from olora_ray.data.mobility.stay import MINUTES, Stay, When

NEEDED = ("user_id", "location_id", "start_day", "start_min", "weekday")
LARGEST = 2**31 - 1
LONGEST = 10 * 366 * MINUTES


def read(files: Sequence[Path], repairs: Repairs) -> Iterator[Named]:
    """The records of csv files; raises UserError that names file and line for what cannot be read."""
    for file in files:
        yield from _file(file, repairs)


def _file(file: Path, repairs: Repairs) -> Iterator[Named]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = csv.reader(opened, strict=True)
        try:
            columns = _columns(next(rows, []), file)
            for row in rows:
                if not row:
                    continue
                try:
                    yield _record(row, columns, str(file), rows.line_num)
                except Broken as broken:
                    repairs.found(BROKEN, str(file), rows.line_num, str(broken))
        except (csv.Error, UnicodeDecodeError) as error:  # what follows cannot be told apart
            raise UserError(f"{file}:{rows.line_num + 1}: no csv in UTF-8: {error}; correct the file") from None


def _columns(header: Sequence[str], file: Path) -> dict[str, int]:
    names = [name.strip() for name in header]
    if missing := [name for name in NEEDED if name not in names]:
        there = ", ".join(names) or "nothing"
        raise UserError(f"{file}:1: no column {missing[0]!r} in the first line; it has {there}")
    if twice := [name for name in (*NEEDED, "duration") if names.count(name) > 1]:
        raise UserError(f"{file}:1: the column {twice[0]!r} is there twice; remove one")
    return {name: names.index(name) for name in (*NEEDED, "duration") if name in names}


def _record(row: Sequence[str], columns: Mapping[str, int], file: str, line: int) -> Named:
    if len(row) <= max(columns.values()):
        raise Broken(f"{len(row)} cells, but the first line names more columns")
    cell = {name: row[place] for name, place in columns.items()}
    if not (person := cell["user_id"].strip()):
        raise Broken("user_id is empty")
    place = _place(cell["location_id"])
    day = number(cell["start_day"], "start_day", 0, 10**6)
    minute = number(cell["start_min"], "start_min", 0, MINUTES - 1)
    when = When(number(cell["weekday"], "weekday", 0, 6), minute)
    return person, "", Stay(place, day * MINUTES + minute, when, _duration(cell.get("duration", "")), file, line)


def _place(text: str) -> int:
    try:
        return number(text, "location_id", 0, LARGEST)
    except Broken:
        raise Broken(f"unknown place: location_id is {text!r}, not a number from 0 on") from None


def _duration(text: str) -> int | None:
    """Whole minutes; None for an empty cell."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LONGEST:
        raise Broken(f"duration is {text!r}, not a number of minutes")
    return round(value)
