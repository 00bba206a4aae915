"""The folder of a search: the settings that it started with, and the state from which it resumes."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.errors import UserError
from olora_ray.config.decided import DecidedConfig
from olora_ray.config.load import override
from olora_ray.model.source import BaseModel
from olora_ray.sweep import run, search_folder
from olora_ray.sweep.space import Space
from olora_ray.sweep.tuner import SweepCallback
from tests import mlflow_database, tiny
from tests.refused import refused

TREE: dict[str, Any] = {
    "search": {"train.lr": {"choice": [1e-3, 1e-4]}},
    "metric": "train/loss",
    "trials": 4,
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DecidedConfig:
    """Config of a search in a storage with nothing but MLflow's database."""
    monkeypatch.setenv("RAY_ADDRESS", "local")  # whether or not Ray runs on this machine
    return override(
        tiny.decided(),
        {"run.storage": str(mlflow_database.place(tmp_path)), "run.name": "quick-space"},
    )


def space(**changes: Any) -> Space:
    return Space.model_validate({**TREE, **changes})


def begun(config: DecidedConfig) -> Path:
    search_folder.begin(config, space(), {"training data": "list", "base model": "base"}, {})
    return Path(config.folder(), "search.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 3}, "(space.seed was 17, is 3)"),
        ({"set": {"train.warmup": 0.1}}, "space.set.train.warmup was not set, is 0.1"),
    ],
)
def test_a_search_with_another_space_is_refused_and_the_difference_told(
    config: DecidedConfig, changes: dict[str, Any], said: str
) -> None:
    begun(config)
    with pytest.raises(UserError) as error:
        search_folder.check_search(config, space(**changes))
    text = str(error.value)
    assert text.startswith(f"run.name: {config.folder()} holds a search with different settings (")
    assert said in text


def test_a_search_with_other_settings_is_refused_and_limits_and_places_may_change(
    config: DecidedConfig,
) -> None:
    begun(config)
    search_folder.check_search(
        config, space(patience=3, time_budget=10, min_improvement=0.1, concurrency=2)
    )
    search_folder.check_search(override(config, {"cluster.cpus_per_worker": 2}), space())
    elsewhere = {"data.train.0.path": "/elsewhere/rows.jsonl", "model.name": "/elsewhere/model"}
    search_folder.check_search(override(config, elsewhere), space())
    with refused("(config.train.weight_decay was 0.0, is 0.1)"):
        search_folder.check_search(override(config, {"train.weight_decay": 0.1}), space())


def test_a_search_of_other_contents_is_refused_before_work_is_shared(config: DecidedConfig) -> None:
    search_folder.begin(config, space(), {"training data": "old", "base model": "base"}, {})
    kept = (file := Path(config.folder(), "search.json")).read_text()
    store: Any = tiny.store()
    spec = TrainSpec(config, BaseModel("m", "/m", "base"), "tokenizer", (0,), store, None)
    with refused("another training data"):
        run.share(spec, space(), 0.0, {})
    assert file.read_text() == kept


@pytest.mark.parametrize("file", ["my space.yaml", "trailing..yaml"])
def test_a_space_file_whose_name_cannot_be_part_of_a_name_is_refused_by_its_name(
    config: DecidedConfig, file: str
) -> None:
    with refused("run.name"):
        search_folder.search_config(config, space(), file, registers=False)
    assert (
        search_folder.search_config(config, space(), "lr_only.v2.yaml", False).run.name
        == "quick-space-lr_only.v2"
    )


def test_what_tune_unpickles_is_the_one_callback_with_the_limits_of_today(tmp_path: Path) -> None:
    """Tune pickles the callback twice, as callback and as stopper. The stopper must be the callback that counts."""
    before = SweepCallback(str(tmp_path), space(patience=5))
    kept = cloudpickle.dumps({"callbacks": [before], "stop": before})
    today = SweepCallback(str(tmp_path), space(patience=2))
    restored = pickle.loads(kept)
    assert restored["callbacks"][0] is restored["stop"] is today
    moved = SweepCallback(str(tmp_path / "moved"), space())
    assert pickle.loads(kept)["stop"] is moved  # the search was moved
    today.since_better = 2
    assert restored["stop"].stop_all()
    assert today.over == "2 trials in a row had no better value"
