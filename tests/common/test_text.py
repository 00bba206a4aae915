"""Plurals, times and tables."""

import pytest

from olora_ray.common import text
from olora_ray.pipeline.progress import clock


@pytest.mark.parametrize(
    ("seconds", "running_down", "length"),
    [
        (0.04, "0:00", "0.0 s"),
        (4.24, "0:04", "4.2 s"),
        (9.96, "0:10", "10 s"),
        (59.4, "0:59", "59 s"),
        (61, "1:01", "1 min 01 s"),
        (192, "3:12", "3 min 12 s"),
        (3599.6, "1:00:00", "1 h 00 min"),
        (90061, "25:01:01", "25 h 01 min"),
        (7501, "2:05:01", "2 h 05 min"),
    ],
)
def test_times(seconds: float, running_down: str, length: str) -> None:
    assert (clock(seconds), text.duration(seconds)) == (running_down, length)


def test_columns() -> None:
    rows = [("name", "rows"), ("a", "7"), ("longer", "")]
    assert text.aligned(rows) == ["name    rows", "a       7", "longer"]
    assert text.aligned(rows, right=[False, True]) == ["name    rows", "a          7", "longer"]
    assert text.aligned([]) == []
