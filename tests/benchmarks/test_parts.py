"""What the benchmarks are made of works with the product as it is: nothing else would notice a rename."""

from pathlib import Path
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
    schedule = Schedule(train.model_copy(update={"steps": 3}), store)
    assert schedule.lr(0) > 0  # with the default, train.lr=auto, this failed
    loader = StepLoader(store, train, 0, "segments")
    steps = [data for data, _ in loader.steps(0, schedule)]
    assert len(steps) == 3  # into the second pass
    assert [data.whole.supervised for data in steps] == [8, 8, 8]


def test_a_trainer_is_made_without_a_driver(benchmark: Any, tmp_path: Path) -> None:
    common = benchmark("common")
    tiny.save(tmp_path)
    model = {"name": str(tmp_path), "dtype": "float32"}
    trainer, _ = common.our_trainer(
        common.config(str(tmp_path), model, train={"micro_batch": 1}), str(tmp_path)
    )
    assert trainer.objective.measures()  # with the default, train.objective=auto, this failed
