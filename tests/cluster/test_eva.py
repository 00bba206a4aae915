"""A worker that trains EVA: made once, of the training data, and never again; ranks as they were found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olora_ray.cluster.channel import Started
from olora_ray.train import checkpoints
from tests.cluster.test_worker import adapter, same, train

EVA: dict[str, Any] = {"adapter__method": "eva", "adapter__init_tokens": 96}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, **EVA)[0].problem is None
    return folder


def ranks(folder: Path) -> set[int]:
    return {
        item.factors.rank
        for item in checkpoints.read(str(folder / checkpoints.name_of(6))).adapter.values()
    }


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


def test_too_few_supervised_tokens_end_the_run_before_it_trains(tmp_path: Path) -> None:
    result, channel = train(
        tmp_path, **(EVA | {"adapter__init_tokens": 999}), adapter__rho=20.0, adapter__rank=32
    )
    assert result.problem.startswith("adapter.method=eva: the training data has ")
    assert Started(1) not in channel.messages
