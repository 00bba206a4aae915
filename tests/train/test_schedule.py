"""Length and learning rates of a run depend on content and config, never on when shards arrive."""

import threading
from collections.abc import Callable
from itertools import count, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.config.schema import Train
from olora_ray.tokens import arrival
from olora_ray.train.loader import Schedule, known_steps, lr_at, planned_steps, total_steps
from tests import tiny

PACK = tiny.pack(6)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "PAUSE", 0.001)


def store(sizes: list[int], arrived: int | None = None) -> tiny.ListStore:
    return tiny.ListStore([PACK] * sum(sizes), sizes, arrived)


class Arriving(tiny.ListStore):
    """A store of which the next shard arrives after a look."""

    def look(self) -> None:
        super().look()
        self.arrived = len(self.front.shards) + 1


def arriving(sizes: list[int]) -> Arriving:
    return Arriving([PACK] * sum(sizes), sizes, 0)


def run(schedule: Schedule) -> list[float]:
    """Return the learning rates of all steps, asked for in the order of a run."""
    return [schedule.lr(step) for step in takewhile(lambda done: not schedule.last(done), count())]


sizes_of = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)
trains = st.builds(
    Train,
    epochs=st.sampled_from([0.3, 0.5, 1, 1.5, 2, 3]),
    steps=st.none() | st.integers(1, 9),
    global_batch=st.integers(1, 7),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.sampled_from([0.0, 0.03, 0.3, 0.9]),
    lr=st.just(0.1),
)


@given(trains, sizes_of)
def test_a_growing_store_gives_the_same_steps_and_rates(train: Train, sizes: list[int]) -> None:
    whole = Schedule(train, store(sizes))
    rates = run(whole)
    total = total_steps(train, sum(sizes))
    assert len(rates) == known_steps(train, store(sizes)) == total
    growing = arriving(sizes)
    assert known_steps(train, store(sizes, 0)) == train.steps
    assert run(Schedule(train, growing)) == rates
    assert known_steps(train, growing) in {None, total}
    assert all(0.0 <= rate <= 0.1 for rate in rates)
    assert rates[0] > 0.0 or train.epochs < 1


@given(trains, st.integers(1, 30))
def test_with_one_shard_or_steps_the_rates_are_those_of_the_steps(train: Train, packs: int) -> None:
    total = total_steps(train, packs)
    expected = [lr_at(step, total, train, 0.1) for step in range(total)]
    assert run(Schedule(train, store([packs]))) == expected
    if train.steps:
        assert run(Schedule(train, store([packs, 3, packs]))) == expected


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("shards", "epochs"), [(2, 1), (2, 3), (10, 1)])
def test_with_equal_shards_the_rates_are_those_of_the_steps_after_the_warm_up(
    kind: str, shards: int, epochs: int
) -> None:
    train = Train.model_validate(
        {"epochs": epochs, "global_batch": 2, "schedule": kind, "warmup": 0.1, "lr": 1.0}
    )
    rates = run(Schedule(train, store([20] * shards)))
    warm = len(rates) // 10
    expected = [lr_at(step, len(rates), train, 1.0) for step in range(len(rates))]
    assert rates[warm:] == pytest.approx(expected[warm:])
    assert rates[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])


def test_what_is_not_certain_is_waited_for() -> None:
    train = Train(global_batch=4, lr=0.1)
    whole = Schedule(train, store([9, 5, 4]))
    asks: list[Callable[[Schedule], object]] = [lambda each: each.last(3), lambda each: each.lr(2)]
    for ask in asks:
        growing = store([9, 5, 4], arrived=1)
        threading.Timer(0.05, lambda late: setattr(late, "arrived", 3), [growing]).start()
        assert ask(Schedule(train, growing)) == ask(whole)
        assert growing.total == 18


def test_the_steps_that_an_automatic_rate_is_made_for_depend_on_no_shard_but_the_first() -> None:
    train = Train(epochs=2, global_batch=4)
    assert (
        planned_steps(train, store([9, 9, 5]))
        == planned_steps(train, store([9, 9, 5], arrived=1))
        == 14
    )
    assert planned_steps(train, store([0, 9, 5], arrived=2)) == 14
    assert planned_steps(Train(steps=7), store([9, 9], arrived=1)) == 7
