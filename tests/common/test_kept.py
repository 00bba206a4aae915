"""What is kept is found again for the same inputs and the same code only."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from olora_ray.adapter import export_preflight
from olora_ray.common import node_cache
from olora_ray.model.source import BaseModel
from tests import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(node_cache, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_found_by_its_inputs_and_by_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    here = node_cache.place("plans", "a", 1)
    assert node_cache.read(here) is None
    node_cache.keep(here, "found")
    assert node_cache.read(node_cache.place("plans", "a", 1)) == "found"
    assert node_cache.place("plans", "a", 2) != here
    monkeypatch.setattr(node_cache, "code", lambda: "another line of code, or another torch")
    assert node_cache.place("plans", "a", 1) != here


def test_what_is_old_goes_when_something_is_kept(cache: Path) -> None:
    old, young = node_cache.place("plans", "old"), node_cache.place("plans", "young")
    for place, days in ((old, 91), (young, 89)):
        node_cache.keep(place, "found")
        at = time.time() - days * 24 * 3600
        os.utime(place, (at, at))
    node_cache.keep(node_cache.place("plans", "new"), "found")
    assert node_cache.read(old) is None
    assert node_cache.read(young) == "found"
    assert len(list((cache / "plans").iterdir())) == 2


def test_the_code_is_all_of_ours_and_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(node_cache, "PACKAGE", tmp_path)
    before = node_cache.code.__wrapped__()
    (tmp_path / "module.py").write_text("x = 2\n")
    after = node_cache.code.__wrapped__()
    assert after != before
    monkeypatch.setattr(node_cache, "version", lambda name: "99")
    assert node_cache.code.__wrapped__() != after


def test_where_nothing_can_be_written_nothing_is_kept(cache: Path) -> None:
    cache.write_text("a file in its place")
    node_cache.keep(node_cache.place("plans", 1), "found")
    assert node_cache.read(node_cache.place("plans", 1)) is None


def base(folder: Path) -> BaseModel:
    tiny.llama().save_pretrained(folder)
    return BaseModel(str(folder), str(folder), "digest")


def test_an_export_that_has_passed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, names = base(tmp_path / "model"), ["model.layers.0.self_attn.q_proj"]
    tries: list[Any] = []
    real = export_preflight.check_adapter
    monkeypatch.setattr(export_preflight, "check_adapter", lambda *given: tries.append(given) or real(*given))
    config = tiny.config(model__name=model.folder)
    assert [export_preflight.problems(model, config, names) for _ in range(2)] == [[], []]
    assert len(tries) == 1
    assert export_preflight.problems(model, tiny.config(model__name=model.folder, adapter__rank=2), names) == []
    assert export_preflight.problems(model, config, [names[0].replace("q_proj", "k_proj")]) == []
    assert len(tries) == 3


def test_an_export_that_has_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, names = base(tmp_path / "model"), ["model.layers.0.self_attn.q_proj"]
    config = tiny.config(model__name=model.folder)
    with monkeypatch.context() as patched:
        patched.setattr(export_preflight, "_found", lambda *given: ["adapter.targets: no"])
        assert [export_preflight.problems(model, config, names) for _ in range(2)] == [["adapter.targets: no"]] * 2
    assert export_preflight.problems(model, config, names) == []
