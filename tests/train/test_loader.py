"""Steps, rates and sequences of a run follow from content and config, whatever the workers, and when shards arrive."""

import threading
import time
from itertools import count, islice, takewhile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olora_ray.config.schema import Train
from olora_ray.tokens.store import order
from olora_ray.train import loader
from olora_ray.train.loader import Schedule, StepLoader, Waiting, lr_at, total_steps
from tests import tiny

PACK = tiny.pack(6)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PAUSES", (0.001, 0.002))


def store(sizes: list[int], arrived: int | None = None) -> Any:
    return tiny.ListStore([PACK] * sum(sizes), sizes, arrived)


def arriving(sizes: list[int]) -> tuple[Any, Any]:
    """A store whose next shard arrives when somebody has waited for it, and the `waiting` that lets it."""
    growing = store(sizes, 0)

    def waiting(number: int, shards: int) -> None:
        assert (number, shards) == (growing.available_shards, len(sizes))
        growing.arrived = max(growing.arrived, number + 1)

    return growing, waiting


def run(schedule: Schedule) -> list[float]:
    """The rates of all steps, asked for in the order of a run."""
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
    assert len(rates) == whole.total() == total_steps(train, sum(sizes))
    growing, waiting = arriving(sizes)
    followed = Schedule(train, growing, waiting)
    assert followed.total() == train.steps
    assert run(followed) == rates
    assert all(0.0 <= rate <= 0.1 for rate in rates)
    assert rates[0] > 0.0 or train.epochs < 1


@given(trains, sizes_of)
def test_rates_rise_and_then_fall_with_the_data(train: Train, sizes: list[int]) -> None:
    rates = run(Schedule(train, store(sizes)))
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@given(trains, st.integers(1, 30))
def test_with_one_shard_or_steps_the_rates_are_those_of_the_steps(train: Train, packs: int) -> None:
    total = total_steps(train, packs)
    expected = [lr_at(step, total, train) for step in range(total)]
    assert run(Schedule(train, store([packs]))) == expected
    if train.steps:
        assert run(Schedule(train, store([packs, 3, packs]))) == expected


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("cosine", 0.05 * (1 + 0.5**0.5), 0.0), ("linear", 0.075, 0.0), ("constant", 0.1, 0.1)],
)
def test_rates_of_a_schedule(schedule: Any, middle: float, end: float) -> None:
    train = Train(schedule=schedule, warmup=0.2, lr=0.1)
    found = [lr_at(step, 100, train) for step in (0, 9, 20, 40, 100)]
    assert found == pytest.approx([0.1 / 21, 1.0 / 21, 0.1, middle, end], abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("shards", "epochs"), [(2, 3), (10, 1)])
def test_with_equal_shards_the_rates_are_those_of_the_steps_after_the_warm_up(
    schedule: Any, shards: int, epochs: int
) -> None:
    train = Train(epochs=epochs, global_batch=2, schedule=schedule, warmup=0.1, lr=1.0)
    rates = run(Schedule(train, store([20] * shards)))
    warm = len(rates) // 10
    assert rates[warm:] == pytest.approx([lr_at(step, len(rates), train) for step in range(warm, len(rates))])
    assert rates[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])


def test_what_is_certain_is_told_without_waiting() -> None:
    train = Train(epochs=1, global_batch=4)
    growing = store([9, 5, 4], arrived=1)
    schedule = Schedule(train, growing, lambda *_: pytest.fail("waited"))
    assert [schedule.ends(done) for done in range(5)] == [False, False, False, None, None]
    assert not schedule.last(2)
    assert schedule.total() is None
    growing.arrived = 3
    assert schedule.total() == 5
    assert [schedule.last(done) for done in (4, 5, 6)] == [False, True, True]


def test_what_is_not_certain_is_waited_for_and_may_be_given_up() -> None:
    def give_up(number: int, shards: int) -> None:
        assert (number, shards) == (1, 3)
        raise ValueError("no more")

    schedule = Schedule(Train(global_batch=4), store([9, 5, 4], arrived=1), give_up)
    for ask in (lambda: schedule.last(3), lambda: schedule.lr(2)):
        with pytest.raises(ValueError, match="no more"):
            ask()
    growing = store([9, 5, 4], arrived=1)
    threading.Timer(0.05, lambda: setattr(growing, "arrived", 3)).start()
    assert Schedule(Train(global_batch=4), growing).last(5)


SEED = 3


def reader(found: Any, train: Train, worker: int = 0, workers: int = 1, waiting: Waiting | None = None) -> StepLoader:
    return StepLoader(found, train, SEED, "segments", worker, workers, waiting)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_micro_batches_follow_from_the_step_and_shares_are_even_to_one(batch: int, workers: int, micro: int) -> None:
    train = Train(global_batch=batch, micro_batch=micro)
    parts = [reader(store([20]), train, w, workers).read(2) for w in range(workers)]
    groups = [group for part in parts for group in part.sequences]
    wanted = order(20, SEED, 2 * batch, 3 * batch).tolist()
    assert groups == [tuple(wanted[place : place + micro]) for place in range(0, batch, micro)]
    shares = [len(part.sequences) for part in parts]
    assert max(shares) - min(shares) <= 1
    assert [part.first for part in parts] == [sum(shares[:w]) for w in range(workers)]
    assert {part.count for part in parts} == {len(groups)} == {train.micro_batches()}
    assert [part.padding_batches for part in parts] == [max(shares) - share for share in shares]
    assert [len(part.micro) for part in parts] == shares
    assert len({part.supervised for part in parts}) == 1


def test_a_worker_without_micro_batches_has_one_of_the_step_to_run_for_the_others() -> None:
    train = Train(global_batch=2, micro_batch=2)
    idle, busy = (reader(store([20]), train, w, 2).read(0) for w in range(2))
    assert (idle.micro, idle.padding_batches, busy.padding_batches) == ((), 1, 0)
    assert torch.equal(idle.padding.labels, busy.micro[0].labels)


@settings(max_examples=60)
@given(
    sizes_of,
    st.sampled_from([0.4, 1, 1.7, 2, 3]),
    st.none() | st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6), st.booleans()), min_size=1, max_size=4),
)
def test_interrupted_runs_meet_exactly_the_orders_sequences(
    sizes: list[int],
    epochs: float,
    steps: int | None,
    batch: int,
    micro: int,
    lives: list[tuple[int, int, bool]],
) -> None:
    """Each life of the run makes some steps with some workers, on a growing or the complete store."""
    train = Train(epochs=epochs, steps=steps, global_batch=batch, micro_batch=micro)
    lives = [*lives, (10_000, 1, True)]
    met: list[list[int]] = []
    for most, workers, grows in lives:
        streams = []
        for worker in range(workers):
            found, waiting = arriving(sizes) if grows else (store(sizes), None)
            ends = Schedule(train, found, waiting).ends
            streams.append(islice(reader(found, train, worker, workers, waiting).steps(len(met), ends), most))
        for parts in zip(*streams, strict=True):  # all workers agree on the end
            met.append([index for data, _ in parts for group in data.sequences for index in group])
    packs = sum(sizes)
    total = total_steps(train, packs)
    assert len(met) == total
    for step, sequences in enumerate(met):
        assert sequences == order(packs, SEED, step * batch, (step + 1) * batch).tolist()
    assert sorted(index for sequences in met for index in sequences) == sorted(order(packs, SEED, 0, total * batch))


def test_a_step_waits_for_its_own_shards_only() -> None:
    """Reading ahead waits for the second shard; the step that is there does not."""
    train = Train(global_batch=4)
    found = store([4, 4], arrived=1)
    told: list[tuple[int, int]] = []
    steps = reader(found, train, waiting=lambda *what: told.append(what)).steps(0, Schedule(train, found).ends)
    data, waited = next(steps)
    assert data.sequences == ((0, 1, 2, 3),)
    assert waited < 1.0
    time.sleep(0.05)
    assert told == []  # nobody waits yet: the caller works on its step
    threading.Timer(0.1, lambda: setattr(found, "arrived", 2)).start()
    data, waited = next(steps)
    assert data.sequences == ((4, 5, 6, 7),)
    assert waited > 0.05
    assert set(told) == {(1, 2)}
    assert list(steps) == []


def test_giving_up_reaches_the_caller_and_leaving_does_not_wait() -> None:
    train, found = Train(global_batch=4), store([4, 4], arrived=1)

    def give_up(number: int, shards: int) -> None:
        raise ValueError(f"shard {number} of {shards} does not come")

    steps = reader(found, train, waiting=give_up).steps(0, Schedule(train, found).ends)
    next(steps)
    with pytest.raises(ValueError, match="shard 1 of 2 does not come"):
        next(steps)
    left = reader(found, train).steps(0, Schedule(train, found).ends)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
