"""The interval of a comparison: its algebra, and how often it contains the truth."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from comparison.run import seeds_needed, visible
from olora_ray.common import statistics as bootstrap
from olora_ray.common.statistics import Difference, crossed


def drawn(
    rng: np.random.Generator,
    seeds: int = 4,
    rows: int = 192,
    seed: float = 0.003,
    row: float = 0.03,
    rest: float = 0.05,
) -> NDArray[np.float64]:
    parts = seed * rng.standard_normal((seeds, 1)) + row * rng.standard_normal((1, rows))
    return np.asarray(parts + rest * rng.standard_normal((seeds, rows)))


def coverage(times: int, **spread: float | int) -> dict[str, float]:
    """Return how often each 95% interval contains the truth, which is 0."""
    rng, held = (
        np.random.default_rng(17),
        dict.fromkeys(("crossed", "rows alone", "seeds alone"), 0),
    )
    for _ in range(times):
        values = drawn(rng, **spread)  # type: ignore[arg-type]
        held["crossed"] += holds(crossed(values).interval())
        held["seeds alone"] += holds(over_seeds(values).interval())
        rows = values.mean(axis=0)
        found = bootstrap.difference(rows, np.zeros(len(rows)), draws=300, seed=1)
        held["rows alone"] += holds(found)
    return {name: count / times for name, count in held.items()}


def holds(found: bootstrap.Interval) -> bool:
    return found.low <= 0.0 <= found.high


def over_seeds(values: NDArray[np.float64]) -> Difference:
    means = values.mean(axis=1)
    return Difference(
        float(means.mean()), float(means.std(ddof=1)) / math.sqrt(len(means)), len(means) - 1
    )


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    found = coverage(200, seed=0.01)
    assert 0.90 <= found["crossed"] <= 0.99
    assert found["rows alone"] < 0.80  # 4 seeds move the mean further than 192 rows do


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0.0, 0.003, 0.01])
@pytest.mark.parametrize(("seeds", "rows"), [(4, 192), (4, 40), (8, 192)])
def test_coverage_over_many_worlds(seed: float, seeds: int, rows: int) -> None:
    found = coverage(1500, seed=seed, seeds=seeds, rows=rows)
    print(f"sd of a seed {seed}, {seeds} seeds x {rows} rows: {found}")
    assert 0.93 <= found["crossed"] <= 0.99
    assert found["rows alone"] < found["crossed"]


def test_what_a_number_of_seeds_can_show() -> None:
    assert visible(0.02, 4, 0.95) == pytest.approx(3.182 * 0.02 / 2, rel=1e-3)
    assert seeds_needed(0.02, 0.01, 0.95) == 18
    assert visible(0.02, 17, 0.95) > 0.01 >= visible(0.02, 18, 0.95)
    assert seeds_needed(9.0, 0.001, 0.95) is None
