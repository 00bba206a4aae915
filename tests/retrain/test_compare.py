"""The comparison of challenger and champion: for which inputs stored results are reused, without Ray."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.common import records
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.evaluation.rows import RowResults
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import Base
from olora_ray.retrain import compare
from olora_ray.retrain.compare import RowSet
from olora_ray.tracking import checksums
from olora_ray.tracking.checksums import Version
from tests import tiny

BASE = Base(BaseModel("m", "", "base"), None, TokenizerSpec("{}", "", {}, 0), ())
VERSION = Version("m", "1", {checksums.TAG: "abc"}, "run")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A config with a scorer in a file."""
    (tmp_path / "scorer_of_a_test.py").write_text("def score(a, b):\n    return {'x': 1.0}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("scorer_of_a_test", "names_it"):
        monkeypatch.delitem(
            sys.modules, name, raising=False
        )  # another test imported it from another folder
    return tiny.decided(
        run__storage=str(tmp_path / "runs"), evaluation__scorer="scorer_of_a_test:score"
    )


def note(config: Config, version: Version = VERSION) -> str:
    return compare.note_file(RowSet("rows", config, "held"), version)


def test_results_are_of_a_version_and_a_precision(config: Config) -> None:
    versions = [
        VERSION,
        replace(VERSION, number="2"),
        replace(VERSION, name="n"),
        replace(VERSION, run_id=None),
        replace(VERSION, tags={checksums.TAG: "abd"}),
    ]
    assert len({note(config, each) for each in versions}) == len(versions)
    assert note(config) == note(config)
    precisions = [override(config, {"model.dtype": each}) for each in ("float32", "bfloat16")]
    assert len(set(map(note, precisions))) == 2


def test_another_scorer_under_the_same_name_measures_anew(config: Config, tmp_path: Path) -> None:
    first = note(config)
    (tmp_path / "scorer_of_a_test.py").write_text("def score(a, b):\n    return {'x': 0.5}\n")
    assert note(config) != first
    (tmp_path / "names_it.py").write_text("from scorer_of_a_test import score\n")
    named = override(config, {"evaluation.scorer": "names_it.score"})
    first = note(named)
    (tmp_path / "scorer_of_a_test.py").write_text("def score(a, b):\n    return {'x': 0.0}\n")
    assert note(named) != first, "also where the module of its name only imports it"


def rows(data: str = "d") -> RowResults:
    return RowResults(data, (1,), (0.5,), {}, ((0, 0),))


def test_versions_whose_results_are_known_are_not_opened(config: Config) -> None:
    """Their files may be deleted, but their tokenizers are still compared."""
    inputs: Any = SimpleNamespace(config=config)
    held_out = RowSet("rows", config, "held")
    wanted = [
        (VERSION, held_out),
        (other := replace(VERSION, number="2"), held_out),
        (VERSION, held_out),
    ]
    for version, tokenizer in ((VERSION, "tokenizer"), (other, "tokenizer")):
        records.write(note(config, version), compare.Compared(tokenizer, rows()))
    assert compare.measured(inputs, wanted) == [rows(), rows(), rows()]
    records.write(note(config, other), compare.Compared("another", rows()))
    with pytest.raises(compare.NotComparable):
        compare.measured(inputs, wanted)
