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


def test_one_worker_exchanges_nothing(benchmark: Any, costs: Any) -> None:
    found = benchmark("simulation").simulate(costs, 1, even)
    assert (found.exchange, found.initialisation) == (0.0, costs.factors)
    assert found.step == costs.step


def test_an_exchange_moves_twice_the_gradient_whatever_the_workers(benchmark: Any, costs: Any) -> None:
    free = replace(costs, latency=0.0, message=0.0, bandwidth=1e9)
    exchanged = benchmark("simulation").exchanged
    assert exchanged(free, 2, 10**9) == pytest.approx(1.0)
    assert exchanged(free, 1000, 10**9) == pytest.approx(2.0, rel=0.01)
    alone = 2 * (costs.latency + 4095 * costs.message)
    assert exchanged(replace(costs, bandwidth=1e30), 4096, 10**9) == pytest.approx(alone)


def test_more_workers_leave_less_for_training(benchmark: Any, costs: Any) -> None:
    simulate = benchmark("simulation").simulate
    left = [simulate(costs, workers, even).efficiency for workers in (1, 8, 64, 512, 4096, 32768)]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.5 < left[0]


def test_the_first_limit_is_named_and_the_next_one_without_it(benchmark: Any, costs: Any) -> None:
    module = benchmark("simulation")
    slow = replace(costs, message=0.01)  # a network of another century
    first = module.first_limit(slow, even)
    assert first.limit == "exchange"
    assert module.simulate(slow, first.workers // 2, even).efficiency >= module.EFFICIENT > first.efficiency
    second = module.first_limit(module.without(slow, "exchange"), even)
    assert second.workers > first.workers
    assert second.limit != "exchange"


def test_without_its_cause_nothing_is_lost_by_it(benchmark: Any, costs: Any) -> None:
    module = benchmark("simulation")
    for cause in module.simulate(costs, 64, even).lost:
        assert module.simulate(module.without(costs, cause), 64, even).lost[cause] == 0.0


def test_a_group_that_fails_faster_than_it_recovers_never_ends(benchmark: Any, costs: Any) -> None:
    found = benchmark("simulation").simulate(replace(costs, between_failures=60.0), 64, even)
    assert (found.efficiency, found.limit) == (0.0, "recovery")


def test_a_checkpoint_that_is_not_written_in_time_is_waited_for(benchmark: Any, costs: Any) -> None:
    slow = replace(costs, written=80.0)
    assert benchmark("simulation").simulate(slow, 1, even).checkpoint == pytest.approx(0.02 + 30.0)
