"""Every sequence is read once, in order, for any workers, interruptions and times at which shards arrive."""

import threading
from itertools import islice
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from olora_ray.config.decided import DecidedTrain
from olora_ray.tokens.store import order
from olora_ray.train.loader import Schedule, StepLoader, total_steps
from tests import tiny
from tests.train.test_schedule import arriving, fast, sizes_of, store
from tests.waiting import until

__all__ = ["fast"]

SEED = 3


def train_of(**changes: Any) -> DecidedTrain:
    wanted = {"micro_batch": 4} | changes
    return tiny.decided(**{f"train__{name}": value for name, value in wanted.items()}).train


def reader(
    found: Any,
    train: DecidedTrain,
    worker: int = 0,
    workers: int = 1,
) -> StepLoader:
    return StepLoader(found, train, SEED, "segments", worker, workers)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_micro_batches_follow_from_the_step_and_shares_are_even_to_one(
    batch: int, workers: int, micro: int
) -> None:
    train = train_of(global_batch=batch, micro_batch=micro)
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
    assert len({part.whole for part in parts}) == 1
    assert parts[0].whole.tokens > parts[0].whole.supervised


@settings(max_examples=60)
@given(
    sizes_of,
    st.sampled_from([0.4, 1, 1.7, 2, 3]),
    st.none() | st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 4),
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 6), st.booleans()), min_size=1, max_size=4
    ),
)
def test_interrupted_runs_meet_exactly_the_orders_sequences(
    sizes: list[int],
    epochs: float,
    steps: int | None,
    batch: int,
    micro: int,
    lives: list[tuple[int, int, bool]],
) -> None:
    """Each attempt makes some steps with some workers, on a growing or a complete store."""
    train = train_of(epochs=epochs, steps=steps, global_batch=batch, micro_batch=micro)
    lives = [*lives, (10_000, 1, True)]
    met: list[list[int]] = []
    for most, workers, grows in lives:
        streams = []
        for worker in range(workers):
            found = arriving(sizes) if grows else store(sizes)
            steps = reader(found, train, worker, workers).steps(len(met), Schedule(train, found))
            streams.append(islice(steps, most))
        for parts in zip(*streams, strict=True):  # all workers agree on the end
            met.append([index for data, _ in parts for group in data.sequences for index in group])
    packs = sum(sizes)
    total = total_steps(train, packs)
    assert len(met) == total
    for step, sequences in enumerate(met):
        assert sequences == order(packs, SEED, step * batch, (step + 1) * batch).tolist()
    assert sorted(index for sequences in met for index in sequences) == sorted(
        order(packs, SEED, 0, total * batch)
    )


def test_a_step_waits_for_its_own_shards_only() -> None:
    train = train_of(global_batch=4)
    found = store([4, 4], arrived=1)
    steps = reader(found, train).steps(0, Schedule(train, found))
    data, waited = next(steps)
    assert data.sequences == ((0, 1, 2, 3),)
    assert waited < 1.0
    threading.Timer(0.1, lambda: setattr(found, "arrived", 2)).start()
    data, waited = next(steps)
    assert data.sequences == ((4, 5, 6, 7),)
    assert waited > 0.05
    assert list(steps) == []


def test_the_next_step_is_read_ahead_and_none_after_the_last() -> None:
    train, found = train_of(global_batch=4), store([4, 4])
    asked: list[int] = []
    loader = reader(found, train)
    read = loader.read
    loader.read = lambda step: asked.append(step) or read(step)  # type: ignore[assignment,func-returns-value,method-assign]
    steps = loader.steps(0, Schedule(train, found))
    next(steps)
    until(lambda: asked == [0, 1])
    assert len(list(steps)) == 1
    assert asked == [0, 1]


def test_leaving_does_not_wait_for_a_shard() -> None:
    train, found = train_of(global_batch=4), store([4, 4], arrived=1)
    left = reader(found, train).steps(0, Schedule(train, found))
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
