"""The comparison of challenger and champion: which results are kept for which, without Ray."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.common import storage
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.evaluation.rows import RowResults
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.run_folder import Fingerprint
from olora_ray.retrain import compare
from olora_ray.tracking import checksums
from olora_ray.tracking.checksums import Version
from tests import tiny


class Inputs:
    """What the name of a note reads of the inputs."""

    fingerprint = Fingerprint("base", "data", "held", "s")


BASE = Base(BaseModel("m", "", "base"), None, TokenizerSpec("{}", "", {}, 0), ())
VERSION = Version("m", "1", {checksums.TAG: "abc"}, "run")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """With a scorer in a file of its own."""
    (tmp_path / "scorer_of_a_test.py").write_text("def score(a, b):\n    return {'x': 1.0}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("scorer_of_a_test", "names_it"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # of another test, from another folder
    return tiny.config(run__storage=str(tmp_path / "runs"), evaluation__scorer="scorer_of_a_test:score")


def note(config: Config, version: Version = VERSION) -> str:
    inputs: Any = Inputs()
    return compare._note(config, inputs, version)


def test_results_are_of_a_version_and_not_of_its_run(config: Config) -> None:
    first = note(config)
    assert note(config) == first
    others = [
        replace(VERSION, number="2"),
        replace(VERSION, name="n"),
        replace(VERSION, run_id=None),
        replace(VERSION, tags={checksums.TAG: "abd"}),
    ]
    assert len({first, *(note(config, each) for each in others)}) == 5


def test_another_scorer_under_the_same_name_measures_anew(config: Config, tmp_path: Path) -> None:
    first = note(config)
    (tmp_path / "scorer_of_a_test.py").write_text("def score(a, b):\n    return {'x': 0.5}\n")
    assert note(config) != first
    (tmp_path / "names_it.py").write_text("from scorer_of_a_test import score\n")
    named = override(config, {"evaluation.scorer": "names_it.score"})
    first = note(named)
    (tmp_path / "scorer_of_a_test.py").write_text("def score(a, b):\n    return {'x': 0.0}\n")
    assert note(named) != first, "also where the module of its name only imports it"
    builtin = override(config, {"evaluation.scorer": "exact_match"})
    assert note(builtin) == note(builtin) != first


def test_another_precision_or_device_measures_anew(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compare, "pick_dtype", lambda *_: torch.float32)
    first = note(config)
    assert note(override(config, {"cluster.gpus_per_worker": 1.0})) != first
    with monkeypatch.context() as patch:
        patch.setattr(compare, "kind_of", lambda _: {"device": "another"})
        assert note(config) != first
    monkeypatch.setattr(compare, "pick_dtype", lambda *_: torch.bfloat16)
    assert note(config) != first, "`auto` may be another one by now"


def rows(data: str = "d") -> RowResults:
    return RowResults(data, (1,), (0.5,), {}, ((0, 0),))


def test_a_version_whose_results_are_known_is_not_opened(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files may be gone; its tokenizer is still compared."""
    inputs: Any = Inputs()
    other = replace(VERSION, number="2")
    storage.write_text(note(config), compare._Measured("tokenizer", rows()).to_json())
    opened: list[str] = []

    class Opened:
        config, base, adapter, tokenizer = None, replace(BASE), None, "tokenizer"

    def opens(_: Config, version: Version) -> Any:
        opened.append(version.number)
        return Opened

    monkeypatch.setattr(compare, "_opened", opens)
    monkeypatch.setattr(compare.connection, "connect", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(compare, "prepare", lambda *_: None)
    monkeypatch.setattr(compare, "measure", lambda *_: rows())
    inputs.base = BASE
    assert compare.measured(config, inputs, [VERSION, other]) == [rows(), rows()]
    assert opened == ["2"]
    assert compare.measured(config, inputs, [other, VERSION]) == [rows(), rows()]
    assert opened == ["2"], "both are known now"
    Opened.tokenizer = "another"
    with pytest.raises(compare.NotComparable):
        compare.measured(config, inputs, [VERSION, replace(VERSION, number="3")])
    storage.write_text(note(config), compare._Measured("another", rows()).to_json())
    with pytest.raises(compare.NotComparable):
        compare.measured(config, inputs, [VERSION, other])
