"""A search makes the factors of each method once; they equal those that a trial would make itself."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olora_ray.cluster import start
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext
from olora_ray.config.load import override
from olora_ray.model import attention as segment_attention
from olora_ray.model.source import BaseModel
from olora_ray.sweep import shared_work
from olora_ray.sweep.space import Space
from olora_ray.tokens.collate import collate
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.scoring import Baseline
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

METHODS = ["lora", "olora", "pissa", "milora", "orthogonal", "nora", "eva"]


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The models of `family` that each call of `make` loads, as (attention, device); each call stands for a process."""
    made = SimpleNamespace(family=lambda: tiny.llama(attention="segments"), asked=[])

    def of(cls: type[SharedBase], spec: TrainSpec, device: torch.device) -> SharedBase:
        made.asked.append((spec.config.model.attention, device.type))
        return SharedBase(SupervisedLoss(made.family()), device)

    monkeypatch.setattr(SharedBase, "of", classmethod(of))
    return made


@pytest.fixture
def base(bases: Any) -> SharedBase:
    return SharedBase(SupervisedLoss(bases.family()), torch.device("cpu"))


def spec_of(**changes: Any) -> TrainSpec:
    store: Any = tiny.store(4)
    settings = tiny.decided(evaluation__samples=0, adapter__rank=8, adapter__alpha=4, **changes)
    return TrainSpec(settings, BaseModel("m", "/m", "base"), "tokenizer", (1,), store, store)


def factors(base: SharedBase, spec: TrainSpec) -> dict[str, Any]:
    return start.factors(SharedBaseContext(base), spec, base.loss, None)


@pytest.mark.parametrize("rank", [8, 4])
def test_every_trial_starts_with_the_factors_that_it_would_make(
    base: SharedBase, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Space.model_validate(
        {"search": {"adapter.method": {"grid": METHODS}, "adapter.rank": {"choice": [4, 8]}}}
    )
    spec = spec_of()
    shared_work.make(spec, str(tmp_path), shared_work.factor_keys(spec.config, space))
    trials = [
        replace(
            spec,
            config=override(
                spec.config, {"adapter.method": name, "adapter.rank": rank, "adapter.alpha": 3}
            ),
        )
        for name in METHODS
    ]
    alone = [factors(base, trial) for trial in trials]
    monkeypatch.setattr(start, "new_factors", _never)
    for trial, own in zip(trials, alone, strict=True):
        found = factors(base, replace(trial, shared=str(tmp_path)))
        assert found.keys() == own.keys()
        for name, item in own.items():
            torch.testing.assert_close(found[name].a0, item.a0, rtol=0, atol=2e-6)
            torch.testing.assert_close(found[name].b0, item.b0, rtol=0, atol=2e-6)


def _never(*arguments: Any) -> None:
    raise AssertionError("these factors are shared")


def test_what_is_there_is_not_made_again_and_what_is_missing_is(
    base: SharedBase, tmp_path: Path
) -> None:
    spec = spec_of()
    shared_work.make(spec, str(tmp_path), [("olora", 8)])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    assert shared_work.make(spec, str(tmp_path), [("olora", 8)]) == shared_work.Shared()
    shared_work.make(spec, str(tmp_path), [("olora", 8), ("orthogonal", 4)])
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert {file.parent.name for file in tmp_path.rglob("*.*")} == {
        tmp_path.name,
        "olora",
        "orthogonal-4",
    }


def test_the_base_is_measured_with_an_attention_that_is_right(tmp_path: Path, bases: Any) -> None:
    """Gemma 2 caps its attention, which the first attention that is tried does not support."""
    segment_attention.register()
    bases.family = lambda: zoo.make(ALL["gemma2"], attention="segments")
    spec = spec_of()
    shared_work.make(spec, str(tmp_path), [])
    found = Baseline.read(str(tmp_path / "baseline.json"), spec.baseline_identity(), 0)
    own = SupervisedLoss(zoo.make(ALL["gemma2"], attention="eager"))
    batches = [
        collate([single], "eager")
        for single in tiny.unpacked([spec.train[number] for number in range(4)])
    ]
    with torch.no_grad():
        expected = sum(float(own(batch)) for batch in batches) / sum(
            len(batch.labels) for batch in batches
        )
    assert found.loss == pytest.approx(expected, rel=1e-4)


def test_what_a_sharded_base_shares_is_made_on_a_cpu(tmp_path: Path, bases: Any) -> None:
    """With another attention than the trials if theirs needs a GPU."""
    for number, attention in enumerate(("varlen", "flash_attention_2", "sdpa")):
        spec = spec_of(cluster__strategy="fsdp", model__attention=attention)
        shared_work.make(
            spec, str(tmp_path / str(number)), [("olora", 8), ("eva", 8)]
        )  # eva runs the model
        shared_work.make(
            spec, str(tmp_path / str(number)), [("olora", 8), ("eva", 8)]
        )  # there is nothing left to do
    assert bases.asked == [("auto", "cpu"), ("auto", "cpu"), ("sdpa", "cpu")]
