"""The rows that a weight draws from a source: the right share, for any layout of the file."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config.schema import Config
from olora_ray.data.reader import read_unit
from olora_ray.tokens.plan import Plan
from olora_ray.tokens.prepare import plan_here
from tests.tokens import helpers

ROWS = 4000


def as_lines(path: Path, rows: Sequence[str], between: str = "") -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" + between for row in rows))
    return path


def as_csv(path: Path, rows: Sequence[str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([f"{row}\nsecond line"] for row in rows)])
    return path


LAYOUTS: dict[str, Callable[[Path, Sequence[str]], Path]] = {
    "plain": lambda folder, rows: as_lines(folder / "a.jsonl", rows),
    "a blank line after each row": lambda folder, rows: as_lines(folder / "a.jsonl", rows, "\n"),
    "four blank lines after each row": lambda folder, rows: as_lines(
        folder / "a.jsonl", rows, "\n\n\n\n"
    ),
    "csv records of two lines": lambda folder, rows: as_csv(folder / "a.csv", rows),
}


def source(path: Path, weight: float, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "format": "text", "weight": weight, **more}


def used(plan: Plan) -> Counter[str]:
    """Return how often each row is used, by its first line."""
    found: Counter[str] = Counter()
    for piece in (piece for shard in plan.shards for piece in shard):
        planned = plan.files[piece.file]
        keep = plan.taken(planned, piece)
        for place, row in read_unit(planned.file, piece.unit, planned.columns, ["text"]):
            found[row["text"].split("\n")[0]] += int(keep[place - piece.unit.first])
    return found


def drawn(config: Config, split: Any = "train") -> Counter[str]:
    return used(plan_here(config, helpers.spec(), split))


def is_share(count: int, of: int, share: float) -> bool:
    """True within five standard deviations of independent draws."""
    return abs(count - of * share) <= 5 * (of * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight", [0.5, 0.2, 2.5])
@pytest.mark.parametrize("period", [2, 5, 16])
def test_each_kind_of_row_is_taken_by_its_share(
    layout: str, weight: float, period: int, tmp_path: Path
) -> None:
    path = LAYOUTS[layout](tmp_path, [f"{n % period} {n}" for n in range(ROWS)])
    counts = drawn(helpers.config(tmp_path / "runs", source(path, weight)))
    assert len(counts) == ROWS
    whole, share = int(weight), weight - int(weight)
    assert set(counts.values()) == {whole, whole + 1}
    for kind in range(period):
        extra = sum(count - whole for row, count in counts.items() if row.startswith(f"{kind} "))
        assert is_share(extra, ROWS // period, share), (kind, extra)


def test_another_night_draws_other_rows(tmp_path: Path) -> None:
    # retrain.replay does this: the known file with a low weight, beside new files.
    known = as_lines(tmp_path / "known.jsonl", [f"{n % 5} {n}" for n in range(ROWS)])
    nights = []
    for night in range(3):
        new = as_lines(tmp_path / f"{night}.jsonl", [f"new {night}"])
        counts = drawn(helpers.config(tmp_path / "runs", source(new, 1), source(known, 0.2)))
        nights.append({row for row, count in counts.items() if count and not row.startswith("new")})
        assert {row[0] for row in nights[-1]} == set("01234"), "each of five kinds in turn"
    assert all(is_share(len(rows), ROWS, 0.2) for rows in nights)
    assert is_share(len(nights[0] & nights[1]), ROWS, 0.04), "independent of the night before"
    assert is_share(len(nights[0] & nights[1] & nights[2]), ROWS, 0.008)


def test_a_draw_does_not_follow_the_draw_of_held_out_rows(tmp_path: Path) -> None:
    path = as_lines(tmp_path / "a.jsonl", [str(n) for n in range(ROWS)])
    config = helpers.config(tmp_path / "runs", source(path, 0.5), eval_fraction=0.5)
    train, held_out = (sum(drawn(config, split).values()) for split in ("train", "eval"))
    assert is_share(train, ROWS, 0.25)
    assert is_share(held_out, ROWS, 0.25)
