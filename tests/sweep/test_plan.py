"""The plan of a search: a trial that could not be exported is one error line before anything is prepared."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from olora_ray.cluster.decide import Decided
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.errors import Problems, UserError
from olora_ray.config.decided import DecidedConfig
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import answers
from olora_ray.pipeline.prepare import Prepared
from olora_ray.sweep import run
from olora_ray.sweep.space import Space
from olora_ray.sweep.space_file import plan
from pipelines import sweep
from tests import mlflow_database, tiny
from tests.pipelines import project
from tests.refused import refused
from tests.said import said

PACKED = ("q_proj", "v_proj")
"""Layers with packed weights, to which no change can be added."""


def spoil(folder: Path) -> Path:
    """Store the weights of PACKED in 8 bits."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    packed = {
        name: value.to(torch.float8_e4m3fn)
        for name, value in tensors.items()
        if name.split(".")[-2] in PACKED
    }
    save_file(tensors | packed, file)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with layers that can be exported, except PACKED."""
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    return spoil(folder)


def planned(model: Path, space: dict[str, Any], **changes: Any) -> list[str]:
    """Return the log lines about a search over the model, or the error."""
    config = tiny.config(model__name=str(model), model__dtype="float32", **changes)
    with said() as lines:
        base: Any = SimpleNamespace(model=BaseModel(str(model), str(model), ""))
        plan(config, tiny.of_data(config), Space.model_validate(space), base)
    return lines


def over(*targets: Any, **more: Any) -> dict[str, Any]:
    return {"search": {"adapter.targets": {"choice": list(targets)}}, **more}


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Existing tokens."""

    def prepare(config: DecidedConfig, base: Any, planned: int, auto: Any, wait: bool) -> Prepared:
        store: Any = tiny.store()
        spec = TrainSpec(config, base.model, "t", (1,), store, store)
        return Prepared(spec, store, answers.check_answers(config, store, base.tokenizer))

    monkeypatch.setattr(run, "prepare_tokens", prepare)


@pytest.mark.parametrize(
    ("metric", "rows", "given"),
    [
        ("score/exact_match", 5, None),
        ("score/exactmatch", 5, "score/exact_match"),
        ("score/exact_match", 0, "nothing"),
        ("eval/loss", 0, None),
    ],
)
def test_a_score_that_no_trial_would_have_is_refused_before_the_trainings(
    metric: str, rows: int, given: str | None, prepared: None
) -> None:
    """Regression: each trial failed after its complete training, and the search ended without a result."""
    config = tiny.decided(
        evaluation__scorer="exact_match", evaluation__rows=rows, evaluation__samples=0
    )
    base: Any = SimpleNamespace(
        model=BaseModel("m", "/m", ""),
        tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids)),
    )
    lr = {"train.lr": {"choice": [1e-3]}}
    space = Space.model_validate({"search": lr, "metric": metric, "scheduler": {"kind": "none"}})
    size: Any = SimpleNamespace(total_bytes=lambda: 0)
    decided, cluster = Decided(config, {}, tiny.ON_CPU, size), ClusterFacts((), False, 1, 1)
    if given is None:
        assert run.train_spec(decided, space, base, cluster)[0].config == config
        return
    with refused(f"metric: {metric} is not measured: exact_match returns {given}"):
        run.train_spec(decided, space, base, cluster)


def test_a_setting_that_only_some_trials_have_is_refused(model: Path) -> None:
    space = over(["up_proj"], ["q_proj", "up_proj"], ["v_proj"])
    with pytest.raises(UserError) as found:
        planned(model, space, adapter__targets=["down_proj"])
    assert isinstance(found.value, Problems)
    _, first, second = found.value.lines
    assert first.startswith("search.adapter.targets=['q_proj', 'up_proj']: adapter.targets: ")
    assert second.startswith("search.adapter.targets=['v_proj']: adapter.targets: ")


def test_the_config_counts_where_it_is_a_trial(model: Path) -> None:
    lr = {"search": {"train.lr": {"choice": [1e-3, 1e-4]}}}
    for space in (over(["up_proj"]), lr, lr | {"include_default": False}):
        with refused("adapter.targets"):
            planned(model, space)
    assert planned(model, over(["up_proj"], include_default=False))
    assert planned(model, lr, export__merged=False)


def test_whether_it_is_merged_may_be_searched(model: Path) -> None:
    space = {"search": {"export.merged": {"choice": [False, True]}}, "include_default": False}
    with refused("search.export.merged=True"):
        planned(model, space)


def test_each_setting_is_planned_at_the_largest_rank(model: Path) -> None:
    space = over(["up_proj"], ["gate_proj", "up_proj"])
    space["search"]["adapter.rank"] = {"choice": [2, 16]}
    lines = planned(model, space, adapter__targets=["down_proj"])
    sizes = [line for line in lines if "model: " in line]
    assert [line.partition("model: ")[0] for line in sizes] == [
        "",
        "search.adapter.targets=['up_proj']: ",
        "search.adapter.targets=['gate_proj', 'up_proj']: ",
    ]
    assert ["rank 16 on 2 layers" in line for line in sizes] == [True, True, False]
    assert "rank 16 on 4 layers" in sizes[2]
    # The cluster, and so the memory of a worker, is not known yet.
    assert not any("memory per worker" in line for line in lines)


def test_the_command_refuses_before_it_starts_a_ray(tmp_path: Path) -> None:
    project.make_tiny(tmp_path)
    mlflow_database.place(tmp_path / "runs")
    tree = project.settings(
        tmp_path, tmp_path / "model", adapter__targets=["up_proj"], evaluation={}
    )
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(over(["up_proj"], ["lm_head"])))
    words = [str(project.write_config(tmp_path, tree)), str(tmp_path / "space.yaml")]
    with refused("search.adapter.targets=['lm_head']"):
        sweep.main(words)
    with refused("registry.model"):
        sweep.main([*words, "registry.model=null", "--register"])
    with refused("expected a config and a space file"):
        sweep.main([])
    assert not (tmp_path / "runs" / "tokens").exists()
