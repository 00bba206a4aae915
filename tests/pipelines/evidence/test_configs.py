"""The configs of the evidence: all load, and are what docs/evidence.md says of them."""

import re
from pathlib import Path

import pytest

from olora_ray.config.load import load_config
from olora_ray.data.formats import check_fields
from olora_ray.train.scoring import Judge

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "pipelines" / "configs" / "evidence").glob("*.yaml"))
ON_TWO_CORES = ("reasoning",)
REFERENCES = {"evidence.scorers:final_number": "1 + 2\n#### 3"}

configs = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)


@configs
def test_it_loads_and_its_scorer_is_found_beside_the_commands(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_the_page_names_every_config() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert {file.name for file in CONFIGS} == set(re.findall(r"configs/evidence/(\w+\.yaml)", page))
