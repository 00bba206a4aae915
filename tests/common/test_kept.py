"""What is kept is found again for the same inputs and the same code only."""

import os
import shutil
import time
from pathlib import Path

import pytest

from olora_ray.common import node_cache
from olora_ray.common.errors import UserError
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import export_preflight
from tests import tiny

pytestmark = pytest.mark.usefixtures("node")


def test_it_is_found_by_its_inputs_and_by_the_code_and_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = node_cache.result_path("plans", "a", 1)
    assert node_cache.read(here) is None
    node_cache.keep(here, "found")
    assert node_cache.read(node_cache.result_path("plans", "a", 1)) == "found"
    assert node_cache.result_path("plans", "a", 2) != here
    monkeypatch.setattr(node_cache, "version", lambda name: "99")
    node_cache.code.cache_clear()
    assert node_cache.result_path("plans", "a", 1) != here
    node_cache.code.cache_clear()


def test_what_is_old_goes_when_something_is_kept(node: Path) -> None:
    old, young = node_cache.result_path("plans", "old"), node_cache.result_path("plans", "young")
    for place, days in ((old, 91), (young, 89)):
        node_cache.keep(place, "found")
        at = time.time() - days * 24 * 3600
        os.utime(place, (at, at))
    node_cache.keep(node_cache.result_path("plans", "new"), "found")
    assert node_cache.read(old) is None
    assert node_cache.read(young) == "found"
    assert len(list((node / "plans").iterdir())) == 2


def base(folder: Path) -> BaseModel:
    tiny.llama().save_pretrained(folder)
    return BaseModel(str(folder), str(folder), "digest")


def test_an_export_that_has_passed_is_not_tried_again(tmp_path: Path) -> None:
    model, names = base(tmp_path / "model"), ["model.layers.0.self_attn.q_proj"]
    config = tiny.config(model__name=model.folder)
    assert export_preflight.problems(model, config, names) == []
    shutil.rmtree(model.folder)
    assert export_preflight.problems(model, config, names) == []
    for other, targets in (
        (tiny.config(model__name=model.folder, adapter__rank=2), names),
        (config, [names[0].replace("q_proj", "k_proj")]),
    ):
        with pytest.raises(UserError):
            export_preflight.problems(model, other, targets)
