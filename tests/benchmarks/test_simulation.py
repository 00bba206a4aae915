"""The simulation of many workers: what it is at the ends, and that it names what loses most."""

from dataclasses import replace
from typing import Any

import pytest


@pytest.fixture
def costs(benchmark: Any) -> Any:
    return benchmark("simulation").Costs(
        factors=0.2,
        factor_bytes=20_000_000,
        gradient_bytes=20_000_000,
        step=1.0,
        blocked=0.02,
        written=0.3,
        start=10.0,
        base_bytes=270_000_000,
    )


def even(workers: int) -> float:
    return 1 / min(workers, 210)


def test_an_exchange_moves_twice_the_gradient_whatever_the_workers(benchmark: Any, costs: Any) -> None:
    free = replace(costs, latency=0.0, message=0.0, bandwidth=1e9)
    exchanged = benchmark("simulation").exchanged
    assert exchanged(free, 2, 10**9) == pytest.approx(1.0)
    assert exchanged(free, 1000, 10**9) == pytest.approx(2.0, rel=0.01)
    alone = 2 * (costs.latency + 4095 * costs.message)
    assert exchanged(replace(costs, bandwidth=1e30), 4096, 10**9) == pytest.approx(alone)


def test_the_first_limit_is_named_and_the_next_one_without_it(benchmark: Any, costs: Any) -> None:
    module = benchmark("simulation")
    slow = replace(costs, message=0.01)  # a network of another century
    first = module.first_limit(slow, even)
    assert first.limit == "exchange"
    assert module.simulate(slow, first.workers // 2, even).efficiency >= module.EFFICIENT > first.efficiency
    second = module.first_limit(module.without(slow, "exchange"), even)
    assert second.workers > first.workers
    assert second.limit != "exchange"
