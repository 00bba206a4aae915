"""Generate mobility records whose law is known, and with it the best that any model can do.

    python pipelines/mobility/generate.py --out FOLDER [--people 120] [--days 80] [--places 90] [--variety 1.0]
        [--explore 0.6] [--gamma 0.21] [--busy 0.3] [--seed 0]

writes check_ins.csv (for prepare.py --format checkins) and law.csv (for report.py), always the same bytes.

--people   how many, with --days days each
--places   in the town
--variety  factor of the number of favourite places of a person
--explore  and --gamma: the probability of a place that is no favourite is explore / visited^gamma, 1/2 at most
--busy     probability of a stay in each hour from 7 to 23

What the law is stands in olora_ray/data/mobility/law.py. law.csv has, for each stay, the place that was most probable
given all before it, and its probability.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import count
from pathlib import Path

from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.config import command_line
from olora_ray.data.mobility.law import Law, Settings, visits
from olora_ray.data.mobility.stay import MINUTES

CHECK_INS = ("id", "user_id", "location_id", "start_day", "start_min", "weekday")
LAW = ("user_id", "stay", "best", "chance")


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
