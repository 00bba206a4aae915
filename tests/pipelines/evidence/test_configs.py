"""The configs of the evidence: all load, and are what docs/evidence.md says of them."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.config.load import load_config
from olora_ray.config.schema import Config
from olora_ray.data.formats import check_fields
from olora_ray.train import estimate
from olora_ray.train.scoring import Judge

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "pipelines" / "configs" / "evidence").glob("*.yaml"))
ON_TWO_CORES = ("boolq", "reasoning")
REFERENCES = {"evidence.scorers:final_number": "1 + 2\n#### 3", "evidence.scorers:yes_no": "yes"}

configs = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)


def test_there_are_all_of_them() -> None:
    assert [file.stem for file in CONFIGS] == [
        "boolq",
        "commonsense_eva",
        "commonsense_nora",
        "olora_alpaca",
        "peft_metamathqa",
        "reasoning",
    ]


@configs
def test_it_loads_and_its_scorer_is_found_beside_the_commands(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "pipelines")  # as Python does for a script there
    config = load_config(file)
    assert config.run.name.startswith("evidence-")
    assert config.data.holds_out()
    for number, source in enumerate(config.data.train):
        check_fields(source.format, source.fields, f"data.train.{number}")
    if config.evaluation.scorer:
        reference = REFERENCES[config.evaluation.scorer]
        assert Judge(config.evaluation.scorer)(reference, reference)["exact_match"] == 1.0


@configs
def test_what_has_not_been_run_says_so_first(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# NOT RUN: needs") == (file.stem not in ON_TWO_CORES)
    assert f"compare.py pipelines/configs/evidence/{file.name} --methods lora,olora" in text
    assert max(map(len, text.splitlines())) <= 120


@configs
def test_no_comparison_has_weight_decay(file: Path) -> None:
    assert load_config(file).train.weight_decay == 0.0  # it pulls to the start here, to 0 in PEFT


@pytest.mark.parametrize("name", ON_TWO_CORES)
def test_the_two_of_two_cores_have_the_protocols_settings(name: str) -> None:
    config = load_config(ROOT / "pipelines" / "configs" / "evidence" / f"{name}.yaml")
    assert (config.train.steps, config.train.global_batch, config.data.packing) == (20, 8, False)
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.targets) == (16, 16.0, "all-linear")
    assert config.adapter.dropout == 0.0
    assert config.gate.group == "group"
    assert config.model == load_config(ROOT / "pipelines" / "configs" / "quickstart.yaml").model


@pytest.mark.parametrize("name", ON_TWO_CORES)
def test_the_time_of_the_two_is_estimated_on_cpus_and_that_of_a_large_model_is_not(name: str) -> None:
    config, size = load_config(ROOT / "pipelines" / "configs" / "evidence" / f"{name}.yaml"), SimpleNamespace()
    for parameters, measured in ((134_515_008, True), (8_000_000_000, False)):
        size.parameters = parameters
        found: Any = size
        assert (estimate.not_measured(config, found, elsewhere=False) is None) == measured


def test_both_differ_in_the_data_and_the_answers_alone() -> None:
    two = [load_config(ROOT / "pipelines" / "configs" / "evidence" / f"{name}.yaml") for name in ON_TWO_CORES]
    left, right = (
        [getattr(config, name) for name in ("model", "adapter", "train", "cluster", "gate")] for config in two
    )
    assert left == right


def settings(name: str) -> Config:
    return load_config(ROOT / "pipelines" / "configs" / "evidence" / f"{name}.yaml")


@pytest.mark.parametrize(
    ("name", "rank", "alpha", "lr", "batch", "schedule"),
    [
        ("olora_alpaca", 32, 16, 3e-4, 16, "linear"),
        ("peft_metamathqa", 32, 64, 1e-4, 4, "cosine"),
        ("commonsense_eva", 16, 1, 5e-4, 32, "linear"),
        ("commonsense_nora", 32, 64, 3e-4, 16, "linear"),
    ],
)
def test_numbers_of_the_sources(name: str, rank: int, alpha: float, lr: float, batch: int, schedule: str) -> None:
    config = settings(name)
    found = (config.adapter.rank, config.adapter.alpha, config.train.lr, config.train.global_batch)
    assert found == (rank, alpha, lr, batch)
    assert config.train.schedule == schedule


def test_the_page_names_every_config() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert {file.name for file in CONFIGS} == set(re.findall(r"configs/evidence/(\w+\.yaml)", page))
