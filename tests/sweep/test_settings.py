"""A search's folder is its own: the settings that it was begun with."""

import json
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.sweep import settings
from olora_ray.sweep.space import Space
from tests import tiny

TREE: dict[str, Any] = {"search": {"train.lr": {"choice": [1e-3, 1e-4]}}, "metric": "train/loss", "trials": 4}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of a search in an empty storage; no Ray and no MLflow is looked for."""
    monkeypatch.setattr(settings.address, "find", lambda: "local")
    monkeypatch.setattr(settings.publish, "check_tracking", lambda *_: None)
    return override(tiny.config(), {"run.storage": str(tmp_path), "run.name": "quick-space"})


def space(**changes: Any) -> Space:
    return Space.model_validate({**TREE, **changes})


def begun(config: Config, found: Space) -> Path:
    settings.begin(config, found, {})
    return Path(config.folder(), "search.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": 5}, "(space.trials was 4, is 5)"),
        ({"seed": 3}, "(space.seed was 17, is 3)"),
        ({"search": {"train.lr": {"choice": [1e-3, 1e-5]}}}, "(space.search.train.lr.choice was [0.001, 0.0001], is ["),
        ({"search": {**TREE["search"], "train.warmup": {"choice": [0.1]}}}, "train.warmup.choice was not there, is [0"),
        ({"set": {"train.warmup": 0.1}}, "space.set.train.warmup was not there, is 0.1"),
        ({"scheduler": {"kind": "none"}}, "(space.scheduler.kind was 'asha', is 'none')"),
    ],
)
def test_a_search_with_another_space_is_refused_and_the_difference_told(
    config: Config, changes: dict[str, Any], said: str
) -> None:
    begun(config, space())
    with pytest.raises(UserError) as error:
        settings.check(config, space(**changes))
    text = str(error.value)
    assert text.startswith(f"run.name: {config.folder()} holds a search with different settings (")
    assert said in text
    assert text.endswith("; choose another run.name or space file, or delete it")
    assert "\n" not in text
    assert len(text) < 1000


def test_a_search_with_other_settings_is_refused_and_limits_may_change(config: Config) -> None:
    begun(config, space())
    settings.check(config, space(patience=3, time_budget=10, min_improvement=0.1, concurrency=2))
    settings.check(override(config, {"cluster.cpus_per_worker": 2}), space())
    with pytest.raises(UserError, match=r"\(config\.train\.weight_decay was 0\.0, is 0\.1\)"):
        settings.check(override(config, {"train.weight_decay": 0.1}), space())


def test_settings_that_did_not_exist_then_may_have_their_default(config: Config) -> None:
    """A search of before can be reported and registered by a version whose config has more fields."""
    config = override(config, {"train.warmup": 0.03})
    file = begun(config, space())
    tree = json.loads(file.read_text())
    del tree["config"]["train.warmup"], tree["config"]["data.train.0.format"]
    file.write_text(json.dumps(tree))
    settings.check(config, space())
    with pytest.raises(UserError, match=r"\(config\.train\.warmup was not there, is 0\.2\)"):
        settings.check(override(config, {"train.warmup": 0.2}), space())


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_description_is_no_traceback(config: Config, text: str) -> None:
    begun(config, space()).write_text(text)
    with pytest.raises(UserError, match="holds a search with different settings"):
        settings.check(config, space())


@pytest.mark.parametrize("file", ["my space.yaml", "ünter.yaml", "a;b.yaml", "trailing..yaml"])
def test_a_space_file_whose_name_cannot_be_part_of_a_name_is_refused_by_its_name(config: Config, file: str) -> None:
    with pytest.raises(UserError, match=rf"^space file {file}: its name becomes a part of the search's; rename it"):
        settings.search_config(config, space(), file, registers=False)
    assert settings.search_config(config, space(), "lr_only.v2.yaml", False).run.name == "quick-space-lr_only.v2"
