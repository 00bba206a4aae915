"""A worker that trains EVA: made once, of the training data, and never again; ranks as they were found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.adapter import initialise
from olora_ray.cluster.channel import Started
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker import train_at
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext
from olora_ray.model.source import BaseModel
from olora_ray.sweep import shared_work
from olora_ray.train import checkpoints
from olora_ray.train.loss import SupervisedLoss
from tests import tiny
from tests.cluster.test_worker import SETTINGS, Channel, adapter, same, train

EVA: dict[str, Any] = {"adapter__method": "eva", "adapter__init_tokens": 96}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, **EVA)[0].problem is None
    return folder


def ranks(folder: Path) -> set[int]:
    return {item.factors.rank for item in checkpoints.read(str(folder / checkpoints.name_of(6))).adapter.values()}


@pytest.mark.parametrize("lost", [(6,), (6, 3, 0)])
def test_a_resumed_run_has_the_factors_of_its_checkpoint(
    whole: Path, tmp_path: Path, lost: tuple[int, ...], without_new_factors: Callable[[], None]
) -> None:
    train(tmp_path, **EVA)
    for step in lost:
        (tmp_path / checkpoints.name_of(step) / "manifest.json").unlink()
    if 0 not in lost:
        without_new_factors()
    assert train(tmp_path, **EVA)[0].problem is None
    assert same(adapter(tmp_path, 6), adapter(whole, 6))
    assert min(ranks(whole)) < 4 < max(ranks(whole))


def test_factors_of_gradients_are_made_and_kept_too(tmp_path: Path, without_new_factors: Callable[[], None]) -> None:
    settings = {"adapter__method": "lora_ga", "adapter__init_tokens": 60}
    first, channel = train(tmp_path, **settings)
    assert first.problem is None
    assert any("lora_ga: 60 supervised tokens of" in str(message) for message in channel.messages)
    before = adapter(tmp_path, 6)
    (tmp_path / checkpoints.name_of(6) / "manifest.json").unlink()
    without_new_factors()
    assert train(tmp_path, **settings)[0].problem is None
    assert same(adapter(tmp_path, 6), before)


def test_too_few_supervised_tokens_end_the_run_before_it_trains(tmp_path: Path) -> None:
    result, channel = train(tmp_path, **(EVA | {"adapter__init_tokens": 999}), adapter__rho=20.0, adapter__rank=32)
    assert result.problem is not None
    assert result.problem.startswith("adapter.method=eva: the training data has ")
    assert Started(1) not in channel.messages


def spec(shared: str | None) -> TrainSpec:
    store: Any = tiny.store(8)
    held_out: Any = tiny.store(3, seed=9)
    base = BaseModel("m", "/m", "base")
    return TrainSpec(tiny.config(**(SETTINGS | EVA)), base, "tokenizer", (1,), store, held_out, shared=shared)


def base() -> SharedBase:
    return SharedBase(SupervisedLoss(tiny.llama(attention="segments")), torch.device("cpu"))


def test_the_trials_of_a_search_take_the_factors_that_were_made_for_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_new_factors: Callable[[], None]
) -> None:
    place = str(tmp_path / "shared")
    monkeypatch.setattr(SharedBase, "of", classmethod(lambda cls, spec, device: base()))
    made = shared_work.make(spec(None), place, [("lora", 4), ("eva", 4)])
    assert [line.partition(" supervised tokens")[0] for line in made.lines] == ["eva: 96"], "only eva looks at data"
    mine = spec(place)
    assert initialise.has(mine.factor_place(), mine.factor_origin(), 4)
    assert not initialise.has(mine.factor_place(), mine.factor_origin(), 2), "ranks of another budget are others"
    without_new_factors()
    result = train_at(SharedBaseContext(base()), spec(place), str(tmp_path / "trial"), Channel())
    assert result.problem is None
    assert same(adapter(tmp_path / "trial", 6), adapter(whole, 6))
