"""Check-ins of Foursquare as TSMC2014 has them (Yang et al., "Modeling user activity preference ...", 2015).

One check-in a line, eight columns with tabs between them, in latin-1, without a first line of names:

    user  venue  category id  category  latitude  longitude  minutes from UTC to local time  UTC time

with times as `Tue Apr 03 18:00:09 +0000 2012`. Venues are numbered from 1 in the order of a hash (records.py).
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from olora_ray.data.mobility.records import BROKEN, Broken, Named, Repairs, number
from olora_ray.data.mobility.stay import Stay, When

COLUMNS = 8
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def read(files: Sequence[Path], repairs: Repairs) -> Iterator[Named]:
    """The check-ins of files; raises UserError that names file and line for what cannot be read."""
    for file in files:
        with file.open(encoding="latin-1", newline="\n") as lines:
            for line, text in enumerate(lines, 1):
                if not text.strip():
                    continue
                try:
                    yield _record(text.rstrip("\r\n"), str(file), line)
                except Broken as broken:
                    repairs.found(BROKEN, str(file), line, str(broken))


def _record(text: str, file: str, line: int) -> Named:
    cells = text.split("\t")
    if len(cells) != COLUMNS:
        raise Broken(f"{len(cells)} columns with tabs between them, not {COLUMNS}")
    person, venue = cells[0].strip(), cells[1].strip()
    if not person:
        raise Broken("the user is empty")
    if not venue:
        raise Broken("unknown place: the venue is empty")
    utc = _time(cells[7])
    local = utc + timedelta(minutes=number(cells[6], "the minutes from UTC", -14 * 60, 14 * 60))
    when = When(local.weekday(), local.hour * 60 + local.minute)
    return person, venue, Stay(0, int(utc.timestamp()) // 60, when, None, file, line)


def _time(text: str) -> datetime:
    """`Tue Apr 03 18:00:09 +0000 2012`, whatever the language of this machine."""
    parts = text.split()
    try:
        _, month, day, clock, zone, year = parts
        if zone != "+0000":
            raise ValueError
        hour, minute, second = map(int, clock.split(":"))
        return datetime(int(year), MONTHS.index(month) + 1, int(day), hour, minute, second, tzinfo=UTC)
    except (ValueError, TypeError, OverflowError):
        raise Broken(f"the time is {text!r}, not one like 'Tue Apr 03 18:00:09 +0000 2012'") from None
