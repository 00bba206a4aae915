"""The sentences of the report are statistically right, and its figures show the differences."""

import pytest

from comparison import report
from comparison.record import Against
from olora_ray.common.statistics import Interval


def against(low: float, high: float) -> Against:
    interval = Interval((low + high) / 2, low, high)
    return Against(interval.mean, 0.02, interval, interval)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.05, -0.02, "better: its loss is lower by at least 0.01"),
        (0.02, 0.05, "worse: its loss is higher by at least 0.01"),
        (0.002, 0.03, "its loss is higher, but perhaps by less than 0.01"),
        (
            -0.006,
            0.008,
            "equal for practical purposes, because less than 0.01 (compare.relevant) does not matter",
        ),
        (-0.02, 0.008, "undecided: its loss was lower, but this may be luck"),
        (float("-inf"), float("inf"), "undecided"),
    ],
)
def test_conclusions(low: float, high: float, said: str) -> None:
    assert said in report.conclusion(against(low, high), 0.01)
