"""The number of trainings, their time, and a budget that is too small."""

from dataclasses import replace
from pathlib import Path

import pytest

from comparison.estimate import Before, Pace, check_budget, line, of_records, trainings
from comparison.grid import Cell, following
from olora_ray.common.errors import UserError
from olora_ray.sweep.record import TrialRecord
from tests.comparison import made


def test_the_trainings_that_are_left(tmp_path: Path) -> None:
    asked = made.comparison(tmp_path)
    # Three grids of 4 points, likely, and of 7 at most; two points at the config's own rate; 2 methods x 4 seeds.
    assert trainings(asked, []) == (12 + 2 + 8, 21 + 2 + 8)
    first = [*following(asked.arms(), {}), *asked.untuned()]
    assert trainings(asked, first)[0] < trainings(asked, [])[0]
    assert trainings(asked, first, Before(final=3)) == (5, 5)
    assert trainings(asked, first, Before(tuned=True)) == (8, 8)
    assert trainings(asked, [], Before(tuning=10)) == (4 + 8, 13 + 8)
    assert trainings(asked, [], Before(tuning=20)) == (8, 3 + 8)
    on_grid = made.comparison(tmp_path, **{"train.lr": 4e-4})
    assert trainings(on_grid, [])[0] == 12 + 1 + 8


def test_the_line_and_the_budget(tmp_path: Path) -> None:
    asked, pace = made.comparison(tmp_path), Pace(100.0, 2)
    assert line(asked, pace, []) == (
        "left to do: 22 to 31 trainings of about 1 min 40 s, 2 at a time: about 18 min 20 s, at most 26 min 40 s"
    )
    curves = replace(pace, curve=60.0)  # of the eight final trainings, two at a time
    assert line(asked, curves, []).endswith("about 22 min 20 s, at most 30 min 40 s")
    check_budget(asked, pace, 0.0, [])
    check_budget(replace(asked, budget=1101.0), pace, 0.0, [])
    with pytest.raises(UserError, match=r"--budget: the comparison needs about 18 min 20 s more, and its limit"):
        check_budget(replace(asked, budget=1099.0), pace, 0.0, [])
    tried: list[Cell] = []
    check_budget(replace(asked, budget=1099.0), pace, 100.0, tried, began=True)  # a little more than it said
    with pytest.raises(UserError, match="after the 5 min 00 s so far"):
        check_budget(replace(asked, budget=1099.0), pace, 300.0, tried, began=True)


def test_without_a_measurement_the_first_trainings_tell(tmp_path: Path) -> None:
    asked, unknown = replace(made.comparison(tmp_path), budget=1.0), Pace(None, 4, "it is measured on CPUs only")
    assert line(asked, unknown, []).endswith("4 at a time; their time is not estimated: it is measured on CPUs only")
    check_budget(asked, unknown, 0.0, [])
    records = [TrialRecord(0, {}, "finished", seconds=50.0), TrialRecord(1, {}, "failed", seconds=2.0)]
    assert of_records(records, replace(unknown, curve=9.0)) == Pace(50.0, 4, curve=9.0)
    assert of_records(records[1:], unknown) == unknown
