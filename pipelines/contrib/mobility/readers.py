"""Readers of mobility records: processed check-ins, check-ins of Foursquare, and trajectories of Geolife.

Processed check-ins are csv files, the form that LLM-Mob (2308.15197) and MoBLLM (2503.16553) start from:

    id,user_id,location_id,latitude,longitude,start_day,start_min,weekday                    Foursquare
    id,user_id,location_id,duration,start_day,end_day,start_min,end_min,weekday              Geolife

The names in the first line identify the columns. user_id, location_id, start_day, start_min and weekday are needed;
duration is optional. start_day counts days from any day, start_min minutes from midnight, weekday from 0 (Monday),
duration minutes.

Check-ins of Foursquare are text files as in TSMC2014 (Yang et al., "Modeling user activity preference ...", 2015): one
check-in per line, eight columns with tabs between them, in latin-1, without a first line of names:

    user  venue  category id  category  latitude  longitude  minutes from UTC to local time  UTC time

with times as `Tue Apr 03 18:00:09 +0000 2012`. Venues are numbered from 1 in the order of a hash (stays.numbered).

Trajectories of Geolife (Zheng et al., 2010) are FOLDER/USER/Trajectory/*.plt: six lines of preamble, then points as
latitude, longitude, 0, altitude in feet, days, date, time in UTC. Points become stays by a simple rule, close to those
of papers but equal to none:

- A stay begins at a point, and lasts while the following points are within RADIUS metres of it, without a gap of more
  than GAP minutes between two of them. It counts if it lasts LEAST minutes. The next stay begins at the first point
  that breaks the rule. All files of a person are one trajectory, so a night without points is part of a stay.
- The place of a stay is the cell of a grid of CELL metres that contains the mean of its points. A place on the border
  of two cells becomes two places.
"""

import csv
import gzip
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stays import BROKEN, LARGEST_PLACE, MINUTES, Named, Records, Repairs, Stay, When, collect

from olora_ray.common.errors import UserError, as_user_error

NEEDED = ("user_id", "location_id", "start_day", "start_min", "weekday")
LONGEST_STAY = 10 * 366 * MINUTES
FOURSQUARE_COLUMNS = 8
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
RADIUS, CELL = 200.0, 250.0
LEAST, GAP = 20, MINUTES
DEGREE = 111_195.0
"""Metres per degree of latitude."""
PREAMBLE = 6
BEIJING = timedelta(hours=8)
"""Local time of nearly all records; the data have no time zone."""
Reader = Callable[[Sequence[Path], Repairs], Iterator[Named]]
"""Reads files, record by record, in their order; raises UserError for faults that are not repaired."""


class Broken(ValueError):
    """A record that cannot be read; the message says why."""


def read(paths: Sequence[str], format: str, repairs: Repairs) -> Records:
    """Read the records in files and folders; raises UserError if one is missing or cannot be read."""
    if format not in READERS:
        raise UserError(
            f"argument --format: {format or 'nothing'!r} is unknown; use one of {', '.join(READERS)}"
        )
    reader, endings = READERS[format]
    files = [file for path in paths for file in _files(Path(path), endings)]
    with as_user_error("argument RECORDS", OSError):
        return collect(reader(files, repairs), repairs)


def _files(path: Path, endings: Sequence[str]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"argument RECORDS: {path}: no such file or folder")
    if matches := sorted(
        file
        for file in path.rglob("*")
        if file.name.lower().endswith(tuple(endings)) and file.is_file()
    ):
        return matches
    raise UserError(f"argument RECORDS: {path}: no file ends in {' or '.join(endings)}")


def read_check_ins(files: Sequence[Path], repairs: Repairs) -> Iterator[Named]:
    """Read the records of csv files; raises UserError that names file and line for a record that cannot be read."""
    first_days: dict[str, int] = {}
    for file in files:
        yield from _check_ins(file, repairs, first_days)


def _check_ins(file: Path, repairs: Repairs, first_days: dict[str, int]) -> Iterator[Named]:
    reads = gzip.open if file.suffix.lower() == ".gz" else open
    with reads(file, "rt", encoding="utf-8-sig", newline="") as opened:
        rows = csv.reader(opened, strict=True)
        try:
            columns = _columns(next(rows, []), file)
            for row in rows:
                if not row:
                    continue
                try:
                    person, venue, stay = _check_in(row, columns, str(file), rows.line_num)
                    # A person's first record sets the weekday of day 0; later records must agree with it.
                    day = stay.at // MINUTES
                    meant = (first_days.setdefault(person, (stay.when.weekday - day) % 7) + day) % 7
                    if stay.when.weekday != meant:
                        raise Broken(
                            f"weekday is {stay.when.weekday}, but by earlier records day {day} has {meant}"
                        )
                    yield person, venue, stay
                except Broken as broken:
                    repairs.found(BROKEN, str(file), rows.line_num, str(broken))
        # After such an error the borders of the following records are not known, so no repair is possible.
        except (csv.Error, UnicodeDecodeError, EOFError) as error:
            raise UserError(
                f"{file}:{rows.line_num + 1}: no csv in UTF-8: {error}; correct the file"
            ) from None


def _columns(header: Sequence[str], file: Path) -> dict[str, int]:
    names = [name.strip() for name in header]
    if missing := [name for name in NEEDED if name not in names]:
        present = ", ".join(names) or "nothing"
        raise UserError(f"{file}:1: no column {missing[0]!r} in the first line; it has {present}")
    return {name: names.index(name) for name in (*NEEDED, "duration") if name in names}


def _check_in(row: Sequence[str], columns: Mapping[str, int], file: str, line: int) -> Named:
    if len(row) <= max(columns.values()):
        raise Broken(f"{len(row)} cells, but the first line names more columns")
    cell = {name: row[index] for name, index in columns.items()}
    if not (person := cell["user_id"].strip()):
        raise Broken("user_id is empty")
    place = _number(cell["location_id"], "location_id", 0, LARGEST_PLACE)
    day = _number(cell["start_day"], "start_day", 0, 10**6)
    minute = _number(cell["start_min"], "start_min", 0, MINUTES - 1)
    when = When(_number(cell["weekday"], "weekday", 0, 6), minute)
    return (
        person,
        "",
        Stay(place, day * MINUTES + minute, when, _duration(cell.get("duration", "")), file, line),
    )


def _duration(text: str) -> int | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LONGEST_STAY:
        raise Broken(f"duration is {text!r}, not a number of minutes")
    return round(value)


def read_foursquare(files: Sequence[Path], repairs: Repairs) -> Iterator[Named]:
    """Read the check-ins of files; raises UserError that names file and line for one that cannot be read."""
    for file in files:
        with file.open(encoding="latin-1", newline="\n") as lines:
            for line, text in enumerate(lines, 1):
                if not text.strip():
                    continue
                try:
                    yield _venue_visit(text.rstrip("\r\n"), str(file), line)
                except Broken as broken:
                    repairs.found(BROKEN, str(file), line, str(broken))


def _venue_visit(text: str, file: str, line: int) -> Named:
    cells = text.split("\t")
    if len(cells) != FOURSQUARE_COLUMNS:
        raise Broken(f"{len(cells)} columns with tabs between them, not {FOURSQUARE_COLUMNS}")
    person, venue = cells[0].strip(), cells[1].strip()
    if not person:
        raise Broken("the user is empty")
    if not venue:
        raise Broken("unknown place: the venue is empty")
    utc = _foursquare_time(cells[7])
    local = utc + timedelta(minutes=_number(cells[6], "the minutes from UTC", -14 * 60, 14 * 60))
    when = When(local.weekday(), local.hour * 60 + local.minute)
    return person, venue, Stay(0, int(utc.timestamp()) // 60, when, None, file, line)


def _foursquare_time(text: str) -> datetime:
    # strptime would read names of months in the locale of this machine.
    parts = text.split()
    try:
        _, month, day, clock, zone, year = parts
        if zone != "+0000":
            raise ValueError
        hour, minute, second = map(int, clock.split(":"))
        return datetime(
            int(year), MONTHS.index(month) + 1, int(day), hour, minute, second, tzinfo=UTC
        )
    except (ValueError, TypeError, OverflowError):
        raise Broken(
            f"the time is {text!r}, not one like 'Tue Apr 03 18:00:09 +0000 2012'"
        ) from None


@dataclass(frozen=True, slots=True)
class Point:
    latitude: float
    longitude: float
    time: datetime
    file: str
    line: int


def read_geolife(files: Sequence[Path], repairs: Repairs) -> Iterator[Named]:
    """Read the stays in .plt files, whose folders name the people; raises UserError that names file and line."""
    people: dict[str, list[Path]] = {}
    for file in sorted(files):
        if file.parent.name != "Trajectory":
            raise UserError(
                f"{file}: expected USER/Trajectory/FILE.plt, where USER names the person"
            )
        people.setdefault(file.parent.parent.name, []).append(file)
    for person, own in people.items():
        for place, stay in _stays(_points(own, repairs)):
            yield person, place, stay


def _stays(points: Iterator[Point]) -> Iterator[tuple[str, Stay]]:
    # The points of one person, in the order of time.
    together: list[Point] = []
    for point in points:
        if together and not _near(together[0], together[-1], point):
            yield from _stay(together)
            together = []
        together.append(point)
    yield from _stay(together)


def _near(first: Point, before: Point, point: Point) -> bool:
    return point.time - before.time <= timedelta(minutes=GAP) and _metres(first, point) <= RADIUS


def _stay(points: Sequence[Point]) -> Iterator[tuple[str, Stay]]:
    minutes = int((points[-1].time - points[0].time).total_seconds()) // 60 if points else 0
    if minutes < LEAST:
        return
    first, local = points[0], points[0].time + BEIJING
    latitude = math.fsum(point.latitude for point in points) / len(points)
    longitude = math.fsum(point.longitude for point in points) / len(points)
    when = When(local.weekday(), local.hour * 60 + local.minute)
    stay = Stay(0, int(first.time.timestamp()) // 60, when, minutes, first.file, first.line)
    yield _cell(latitude, longitude), stay


def _cell(latitude: float, longitude: float) -> str:
    row = math.floor(latitude * DEGREE / CELL)
    # The row's middle latitude gives all its cells the same width.
    middle = math.radians((row + 0.5) * CELL / DEGREE)
    return f"{row}/{math.floor(longitude * DEGREE * math.cos(middle) / CELL)}"


def _metres(first: Point, second: Point) -> float:
    # A plane is exact enough, because the points are close to each other.
    north = (second.latitude - first.latitude) * DEGREE
    east = (second.longitude - first.longitude) * DEGREE * math.cos(math.radians(first.latitude))
    return math.hypot(north, east)


def _points(files: Sequence[Path], repairs: Repairs) -> Iterator[Point]:
    before: Point | None = None
    for file in files:
        with file.open(encoding="ascii", errors="replace") as lines:
            for line, text in enumerate(lines, 1):
                if line <= PREAMBLE or not text.strip():
                    continue
                try:
                    point = _point(text, str(file), line)
                    if before and point.time < before.time:
                        raise Broken(
                            f"the time is earlier than in the point at {before.file}:{before.line}"
                        )
                except Broken as broken:
                    repairs.found(BROKEN, str(file), line, str(broken))
                else:
                    yield (before := point)


def _point(text: str, file: str, line: int) -> Point:
    cells = text.strip().split(",")
    if len(cells) != 7:
        raise Broken(f"{len(cells)} cells with commas between them, not 7")
    try:
        time = datetime.strptime(f"{cells[5]} {cells[6]}", "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        raise Broken(
            f"the time is {cells[5]!r}, {cells[6]!r}, not one like '2008-10-23', '02:53:04'"
        ) from None
    try:
        latitude, longitude = float(cells[0]), float(cells[1])
    except ValueError:
        latitude = longitude = math.nan
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise Broken(
            f"unknown place: latitude {cells[0]!r} and longitude {cells[1]!r} are out of range"
        )
    return Point(latitude, longitude, time, file, line)


def _number(text: str, name: str, least: int, most: int) -> int:
    """Return a whole number within bounds; raises Broken if it is none."""
    # pandas writes the whole numbers of a column with gaps as 12.0.
    value = text.strip().removesuffix(".0")
    if (
        not value.removeprefix("-").isascii()
        or not value.removeprefix("-").isdigit()
        or len(value) > 18
    ):
        raise Broken(f"{name} is {text!r}, not a whole number")
    if not least <= int(value) <= most:
        raise Broken(f"{name} is {value}, not {least} to {most}")
    return int(value)


READERS: Mapping[str, tuple[Reader, tuple[str, ...]]] = {
    "checkins": (read_check_ins, (".csv", ".csv.gz")),
    "foursquare": (read_foursquare, (".txt", ".tsv")),
    "geolife": (read_geolife, (".plt",)),
}
"""Name of a format -> its reader, and the suffixes of its files in a folder."""
