import json
from dataclasses import replace

import pytest

from olora_ray.sweep.report import text
from tests.sweep.odd import ODD, search


def said(record: object) -> dict[str, str]:
    return dict(text.facts(record))  # type: ignore[arg-type]


def test_the_best_is_compared_with_the_default() -> None:
    record = search([({"a": 1}, 2.0), ({"a": 2}, 1.5)], default=0)
    assert said(record)["best"] == "eval/loss 1.5 (trial 1): a=2"
    assert (
        said(record)["default"]
        == "the best is 0.5 (25.0%) better than the unchanged config: 2 (trial 0)"
    )
    higher = replace(record, mode="max")
    assert "no other trial was better" in said(higher)["default"]


def test_a_search_in_which_all_failed_says_so() -> None:
    assert said(ODD["all failed"]) == {
        "best": "no trial has a value of eval/loss",
        "trials": "6 in 1 min 00 s: 6 failed",
    }


@pytest.mark.parametrize("name", ODD)
def test_everything_can_be_said_and_tabled(name: str) -> None:
    record = ODD[name]
    assert text.lines(record)
    assert text.summary(record)
    columns, rows = text.table(record)
    assert all(len(row) == len(columns) for row in rows)
    json.dumps(rows, allow_nan=False)
