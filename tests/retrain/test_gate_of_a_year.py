"""The gate of a year: stricter levels as rows change, the best champions, and the guard."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.config.load import load_config, override
from olora_ray.config.nights import Gate
from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.evaluation.lm_eval_tasks import TaskResult
from olora_ray.evaluation.rows import RowResults
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.run_folder import Fingerprint
from olora_ray.retrain import compare
from olora_ray.retrain.gate import LOOKS, HeldOut, decide
from olora_ray.retrain.recipe import AGAINST
from olora_ray.tracking.checksums import GATE, Version
from tests import mlflow_database, tiny
from tests.refused import refused
from tests.retrain.nightly import Nightly
from tests.retrain.test_gate import results
from tests.retrain.test_missing_champion import LOSS, NAME, Nights, replaced

GUARD_LOSS = "test.guard"


def noisy(count: int, better: float, seed: int = 0) -> tuple[RowResults, RowResults]:
    """Return challenger and champion; rows differ by 0.2, and by `better` on average."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(0, 0.2, count)
    champion = rng.normal(3, 0.5, count)
    return results(champion - difference + difference.mean() - better), results(champion)


def test_every_further_set_of_rows_asks_for_more_confidence() -> None:
    ours, theirs = noisy(100, 0.067)  # 3.3 standard errors
    assert decide(Gate(), ours, theirs).passed
    assert not decide(Gate(), ours, theirs, looks=LOOKS).passed
    assert "99.75% interval" in decide(Gate(), ours, theirs, HeldOut(sets=20)).reason
    many = decide(Gate(), ours, theirs, HeldOut(sets=365))
    assert (many.passed, "99.99% interval" in many.reason) == (False, True)
    assert not decide(Gate(), *noisy(100, 0.05)).passed, (
        "2.5 standard errors are nine promotions in 1,000 nights"
    )


def test_what_lets_champions_become_worse_needs_an_anchor() -> None:
    for loose in ({"must_improve_by": -0.1}, {"confident": False}):
        with pytest.raises(ValidationError, match="set anchor"):
            Gate.model_validate(loose)
        assert Gate.model_validate({**loose, "anchor": 0.2}).anchor == 0.2
    with pytest.raises(ValidationError):
        Gate.model_validate({"guard": ["arc_easy", "rows/other.jsonl"]})


def test_thirty_small_steps_down_end_at_the_anchor() -> None:
    gate, first = Gate(must_improve_by=-0.05, anchor=0.2), 1.0
    champion, promotions = results([first] * 40), 0
    best = champion
    for night in range(30):
        challenger = results([champion.losses[0] + 0.03] * 40)
        decision = decide(gate, challenger, champion, anchor=best)
        if decision.passed:
            champion, promotions = challenger, night + 1
    assert promotions == 6
    assert champion.losses[0] == pytest.approx(1.18)
    assert "above -0.2 (gate.anchor)" in decision.reason


def test_a_version_that_has_forgotten_other_tasks_is_refused() -> None:
    ours, theirs = noisy(80, 0.2)
    before = results(np.linspace(2, 3, 800), data="guard")
    lost = decide(
        Gate(), ours, theirs, guard=(results(np.linspace(2, 3, 800) + 0.05, data="guard"), before)
    )
    assert not lost.passed
    assert lost.reason.startswith(
        "guard: eval/loss 2.5500, the best champion's 2.5000: worse by 0.0500"
    )
    kept = decide(
        Gate(), ours, theirs, guard=(results(np.linspace(2, 3, 800) + 0.01, data="guard"), before)
    )
    assert kept.passed
    assert kept.details["guard"]["mean"] == pytest.approx(-0.01)
    assert (lost.harms, kept.harms) == (True, False)


def test_only_a_challenger_that_is_better_on_its_task_may_be_shrunk() -> None:
    ours, theirs = noisy(80, 0.2)
    guard = noisy(100, 0.0)  # worse by up to 0.04, with 95 %
    strict = Gate(guard_margin=0.042)
    assert decide(strict, ours, theirs, guard=guard).passed
    assert decide(strict, ours, theirs, guard=guard, looks=LOOKS).harms
    worse = decide(Gate(guard_margin=0.01), theirs, ours, guard=guard)
    assert (worse.passed, worse.harms) == (False, False)


def version(number: int, day: float, rows: str = "same", **tags: str) -> Version:
    about = Fingerprint("base", "data", rows, "s").tags()
    return Version("m", str(number), {**about, AGAINST: "", **tags}, created=day * 86400.0)


def test_sets_of_rows_and_uses_are_counted_and_stale_rows_named() -> None:
    old, others = version(1, 0, "old"), [version(n, 300 + n, f"set {n % 3}") for n in range(2, 8)]
    by_hand = replace(version(9, 305), tags={})
    found = compare.uses_of_rows(others[-1], others[0], [old, *others, by_hand])
    assert (found["sets"], found["versions"], found["champion_days"], found["stale"]) == (
        4,
        2,
        5,
        "",
    )
    later = version(10, 370, "set 1")
    found = compare.uses_of_rows(later, None, [old, *others, later])
    assert (found["sets"], found["versions"]) == (3, 3), (
        "the first set was judged on over a year ago"
    )
    late = version(11, 400, "set 1")
    assert compare.uses_of_rows(late, None, [*others, late])["stale"].startswith(
        "the held-out rows are stale: the same"
    )


def test_answers_that_were_right_and_are_wrong_are_listed_with_their_places() -> None:
    inputs: Any = SimpleNamespace(
        held_out=SimpleNamespace(files=[SimpleNamespace(file=SimpleNamespace(uri="/d/a.jsonl"))])
    )
    ours, theirs = results([1.0] * 4, first=[1, 0, 0, 1]), results([1.0] * 4, first=[1, 1, 1, 0])
    lost = compare.lost_rows(inputs, ours, theirs)
    assert lost == {"first": {"rows": 2, "examples": ["/d/a.jsonl:2", "/d/a.jsonl:3"]}}


def measured(_: object, wanted: list[tuple[Version, Any]]) -> list[RowResults]:
    """Stands for compare.measured: losses are tags of the version."""
    return [
        results(
            [float(each.tags[LOSS if rows.name == "the held-out rows" else GUARD_LOSS])] * 24,
            data=rows.name,
        )
        for each, rows in wanted
    ]


def test_the_best_champions_are_tags_and_decide_in_later_nights(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"must_improve_by": -0.1, "anchor": 0.2, "guard": "text"}
    nights = Nights(tmp_path, load_config(Nightly(tmp_path, model, gate=gate).config))
    mlflow_database.place(tmp_path / "runs")
    nights.client.create_registered_model(NAME)
    replaced(monkeypatch, nights)
    monkeypatch.setattr(compare, "measured", measured)
    guard_losses, register = iter([2.0, 1.9, 1.92, 1.92, 1.96, 1.92]), nights.register
    monkeypatch.setattr(
        nights,
        "register",
        lambda loss, tags, run: register(loss, {**tags, GUARD_LOSS: str(next(guard_losses))}, run),
    )
    for loss in (1.0, 1.08, 1.16):
        assert "is the champion of" in nights.call(loss)
    tags = nights.aliases.version("3").tags
    assert (tags[compare.ANCHOR], tags[compare.GUARD]) == ("1", "2")
    log = nights.call(1.24)
    assert "refused: eval/loss 1.2400, the best champion's 1.0000: worse by 0.2400" in log
    assert "held-out rows: used for 4 versions since" in log
    assert "refused: guard: eval/loss 1.9600, the best champion's 1.9000" in nights.call(0.9)
    assert "is the champion of" in nights.call(0.91)
    assert nights.aliases.version("6").tags[compare.ANCHOR] == "6"
    nights.client.delete_model_version(NAME, "2")
    assert nights.aliases.version("6").tags[GATE].startswith("passed")


BASE = Base(BaseModel("m", "", "base"), None, TokenizerSpec("{}", "", {}, 0), ())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny.decided(run__storage=str(tmp_path / "runs"), evaluation__scorer="exact_match")


def test_the_guard_rows_are_the_shipped_text_or_the_sources(config: Config, tmp_path: Path) -> None:
    inputs: Any = SimpleNamespace(base=BASE, data=config)
    shipped = compare.guard(config, inputs)
    assert (shipped.config.evaluation.scorer, shipped.config.data.eval[0].path) == (
        None,
        str(compare.TEXT),
    )
    assert len(compare.TEXT.read_text().splitlines()) == 800
    assert compare.guard(override(config, {"gate.guard": None}), inputs) is None
    (tmp_path / "own.jsonl").write_text('{"text": "other rows"}\n')
    own = compare.guard(override(config, {"gate.guard": [str(tmp_path / "own.jsonl")]}), inputs)
    assert own.digest != shipped.digest
    with refused("gate.guard"):
        compare.guard(override(config, {"gate.guard": [str(tmp_path / "missing.jsonl")]}), inputs)


def test_tasks_as_a_guard_count_their_wrong_answers(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "load_tasks", lambda names, _: dict.fromkeys(names))
    tasks = compare.guard(
        override(config, {"gate.guard": ["arc_easy"]}), SimpleNamespace(base=BASE, data=config)
    )  # type: ignore[arg-type]
    assert tasks is not None
    done = {
        "arc_easy": TaskResult(
            "test[:3]", {}, {}, {"acc_norm": (0.0, 0.0, 0.0), "acc": (1.0, 0.0, 1.0)}
        )
    }
    monkeypatch.setattr(compare.lm_eval_tasks, "run", lambda *_: done)
    rows = compare.results_on(tasks, BASE, None, config, ClusterFacts((), False, 1, 1))
    assert rows.losses == (0.0, 1.0, 0.0)
    assert rows.metric("eval/loss") == pytest.approx(1 / 3)
