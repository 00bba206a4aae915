"""Trajectories of Geolife (Zheng et al., 2010): FOLDER/USER/Trajectory/*.plt, after six lines of preamble points as
latitude, longitude, 0, altitude in feet, days, date, time in UTC.

Points become stays by a simple rule, not that of any paper to the last letter:

- A stay begins at a point and lasts as long as the following ones lie within RADIUS metres of it, without a gap of more
  than GAP minutes between two of them; it counts from LEAST minutes on. Otherwise the next stay begins at the point
  that broke the rule. All files of a person are one trajectory, so a night without points is part of a stay.
- Its place is the cell of a grid of CELL metres in which the mean of its points lies. A place on the border of two
  cells becomes two places.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from olora_ray.common.errors import UserError
from olora_ray.data.mobility.records import BROKEN, Broken, Named, Repairs
from olora_ray.data.mobility.stay import MINUTES, Stay, When

RADIUS, CELL = 200.0, 250.0
LEAST, GAP = 20, MINUTES
DEGREE = 111_195.0
"""Metres of a degree of latitude."""
PREAMBLE = 6
BEIJING = timedelta(hours=8)
"""Local time of nearly all records; the data do not say where a point's clock stood."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a trajectory."""

    latitude: float
    longitude: float
    time: datetime
    file: str
    line: int


def read(files: Sequence[Path], repairs: Repairs) -> Iterator[Named]:
    """The stays in .plt files, whose folders name the people; raises UserError that names file and line."""
    people: dict[str, list[Path]] = {}
    for file in sorted(files):
        if file.parent.name != "Trajectory":
            raise UserError(f"{file}: expected USER/Trajectory/FILE.plt, which says whose trajectory it is")
        people.setdefault(file.parent.parent.name, []).append(file)
    for person, own in people.items():
        for place, stay in stays(_points(own, repairs)):
            yield person, place, stay


def stays(points: Iterator[Point]) -> Iterator[tuple[str, Stay]]:
    """Name of the place and stay, for the points of one person in the order of time."""
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
    """The stay of points that lie together, if it lasted."""
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
    middle = math.radians((row + 0.5) * CELL / DEGREE)  # of the row, so that all its cells are equally wide
    return f"{row}/{math.floor(longitude * DEGREE * math.cos(middle) / CELL)}"


def _metres(first: Point, second: Point) -> float:
    """Distance of points that are near each other."""
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
                        raise Broken(f"the time lies before that of the point at {before.file}:{before.line}")
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
        raise Broken(f"the time is {cells[5]!r}, {cells[6]!r}, not one like '2008-10-23', '02:53:04'") from None
    try:
        latitude, longitude = float(cells[0]), float(cells[1])
    except ValueError:
        latitude = longitude = math.nan
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise Broken(f"unknown place: latitude {cells[0]!r} and longitude {cells[1]!r} are on no map")
    return Point(latitude, longitude, time, file, line)
