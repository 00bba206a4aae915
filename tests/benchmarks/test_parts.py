"""What the benchmarks are made of works with the product as it is: nothing else would notice a rename."""

from typing import Any

import numpy as np
import pytest

from olora_ray.train.loader import Schedule, StepLoader
from tests import tiny
from tests.pipelines import project


@pytest.mark.parametrize(
    "name", sorted(file.stem for file in (project.ROOT / "benchmarks").glob("*.py"))
)
def test_every_script_finds_what_it_imports(benchmark: Any, name: str) -> None:
    assert benchmark(name).__doc__


def test_a_loader_reads_the_store_in_memory(benchmark: Any) -> None:
    rows = [(np.arange(2, 8, dtype=np.int32), np.arange(6) > 1)] * 5
    store = benchmark("common").memory_store(rows, 8)
    train = (
        benchmark("common")
        .config("", {"name": ""}, train={"steps": 2, "global_batch": 2, "micro_batch": 1})
        .train
    )
    assert (
        Schedule(train, store).lr(0) > 0
    )  # with the default, train.lr=auto, tree.py and memory.py failed
    loader = StepLoader(store, train, 0, "segments")
    steps = [data for data, _ in loader.steps(0, lambda done: done >= 3)]
    assert len(steps) == 3  # into the second pass
    assert [data.whole.supervised for data in steps] == [8, 8, 8]


def test_eva_finds_on_a_batch_what_peft_finds(benchmark: Any) -> None:
    module = benchmark("init_from_data")
    watch = benchmark("init").Watch
    used, ours = module.of_ours(tiny.llama(), 4, watch)
    _, other = module.eva_of_peft(tiny.llama(), 4, watch)
    assert used.seconds > 0
    assert set(other) <= set(ours)
    assert max(module.sine(ours[name], other[name]) for name in other) < 0.02
