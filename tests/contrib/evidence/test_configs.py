"""The configs of the evidence: all load, and the page beside them names each."""

import re
from pathlib import Path

import pytest

from olora_ray.config.load import load_config
from olora_ray.data.formats import check_fields
from olora_ray.train.scoring import Judge

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "pipelines" / "contrib" / "evidence" / "configs").glob("*.yaml"))
ON_TWO_CORES = ("reasoning",)
REFERENCES = {"evidence.scorers:final_number": "1 + 2\n#### 3"}

configs = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)


@configs
def test_it_loads_and_its_scorer_is_found(file: Path) -> None:
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
    assert (
        f"olora-ray compare pipelines/contrib/evidence/configs/{file.name} --methods lora,olora"
        in text
    )
    assert max(map(len, text.splitlines())) <= 120


def test_the_page_names_every_config() -> None:
    page = CONFIGS[0].parents[1] / "README.md"
    named = re.findall(r"`configs/(\w+\.yaml)`", page.read_text(encoding="utf-8"))
    assert sorted(named) == [file.name for file in CONFIGS]
