"""Held-out preference pairs: one line a pair, measured against the base model, which takes one pass."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config.load import build, override
from olora_ray.evaluation import held_out
from olora_ray.evaluation.rows import compare
from olora_ray.pipeline.base import open_base
from olora_ray.tokens import prepare
from tests import tiny
from tests.pipelines.project import make_model, settings


def test_pairs_are_measured_against_the_base_model_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works: list[Any] = []

    def without_ray(make: Any, some: Any, config: Any) -> list[Any]:
        works.extend(some)
        return list(map(make(), some))

    monkeypatch.setattr(held_out, "map_over_actors", without_ray)
    with (tmp_path / "pairs.jsonl").open("w") as out:
        for number in range(6):
            row = {"prompt": f"{number} and {number}?", "chosen": "yes", "rejected": "no, never"}
            out.write(json.dumps(row) + "\n")
    tree = settings(tmp_path, make_model(tmp_path / "model"))
    tree["data"]["eval"] = [{"path": str(tmp_path / "pairs.jsonl"), "format": "preference"}]
    tree["evaluation"] = {}
    asked = build(tree)
    config = tiny.decided(asked)
    base = open_base(asked)
    other = make_model(tmp_path / "other", width=32)
    changed = replace(base, model=open_base(override(asked, {"model.name": str(other)})).model)

    def measured(model: Any) -> Any:
        store = prepare.prepare(config, base.spec, "eval")
        return held_out.measure(model, None, store, config, lambda: base.model)[0]

    same = measured(base)
    of_store = len(works)
    theirs = measured(changed)
    assert len(works) == 3 * of_store / 2  # the base's pass is not done again
    assert same.pairs() == list(range(6))
    assert same.metric("eval/pairs/loss") == pytest.approx(math.log(2), abs=1e-6)
    assert same.metric("eval/pairs/preferred") == 0.5
    assert compare("eval/pairs/margin", theirs, same).interval.mean != 0.0
    chosen = sum(same.losses) - sum(theirs.losses)
    assert theirs.metric("eval/pairs/chosen") == pytest.approx(chosen / 6, rel=1e-4)
    store = prepare.prepare(config, base.spec, "eval")
    right = [each.chosen for number in range(len(store)) for each in store[number].examples()]
    assert list(same.tokens) == right
