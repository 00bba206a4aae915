"""Retraining through its entry script, with real Ray and MLflow: night after night, killed, and two at once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common import lock
from olora_ray.tracking.checksums import GATE
from pipelines import registry
from tests.pipelines import project
from tests.retrain.nightly import ANSWERS, Nightly, write

pytestmark = pytest.mark.ray


def last(nightly: Nightly) -> dict[str, str]:
    """Return the tags of the latest decision."""
    tags: dict[str, str] = nightly.decisions()[-1].data.tags
    return tags


@pytest.mark.slow
def test_the_first_version_becomes_champion_and_the_same_again_does_nothing(
    folder: Path, model: Path
) -> None:
    told = folder / "told.json"
    nightly = Nightly(folder, model, notify={"command": f"cat >>{told}"}, gate={"guard": "text"})
    with lock.held(str(folder / "runs" / "locks" / "nightly.json"), "the test"):
        refused = nightly.call(code=75)
    assert "error: the retraining of nightly is already running (process" in refused
    assert "ray:" not in refused
    log = nightly.call()
    assert "measuring version 1 on the guard rows" in log
    assert "version 1 is the champion of nightly" in log
    assert nightly.aliases.current() == {"champion": "1"}
    assert nightly.aliases.version("1").tags[GATE].startswith("passed: eval/loss")
    again = nightly.call()
    assert "nothing changed since version 1" in again
    assert "ray:" not in again
    assert nightly.made() == 1
    message = json.loads(told.read_text())  # only the promotion
    assert (message["event"], message["version"], message["champion"]) == ("promoted", "1", None)
    nightly.add("0-first", ["one", "two"], 19)  # of 40
    refused = nightly.call(code=2)
    assert (
        "error: data.train: 19 rows, but the champion, version 1, had 40: more than the share"
        in refused
    )
    assert "ray:" not in refused
    assert [run.data.tags["olora.decision"] for run in nightly.decisions()] == [
        "promoted",
        "unchanged",
        "failed",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("origin", "merged"), [("base", True), ("champion", False)])
def test_new_data_then_poisoned_data_then_rollback(
    folder: Path, model: Path, origin: str, merged: bool
) -> None:
    settings = {"retrain": {"from": origin, "replay": 0.5}, "export": {"merged": merged}}
    nightly = Nightly(folder, model, train=longer(model), **settings)
    nightly.call()
    nightly.add("1-more", ["three"], 40)
    log = nightly.call()
    assert "changed since the champion, version 1: training data" in log
    assert nightly.aliases.current() == {"champion": "2", "previous": "1"}, log
    assert nightly.aliases.version("2").tags["olora.retrained_from"].startswith(origin)
    assert (last(nightly)["olora.decision"], last(nightly)["olora.challenger"]) == (
        "promoted",
        "nightly/2",
    )
    metrics = nightly.decisions()[-1].data.metrics
    assert metrics["improvement/low"] <= metrics["improvement/mean"] <= metrics["improvement/high"]
    assert metrics["challenger/eval/loss"] < metrics["champion/eval/loss"]

    nightly.add("2-poison", ["one", "two", "three"], 240, shuffled=True)
    log = nightly.call()
    why = "eval/loss" if origin == "base" else "no step on the new rows lowered the held-out loss"
    assert f"refused: {why}" in log, log
    assert nightly.aliases.current() == {"champion": "2", "previous": "1", "challenger": "3"}
    assert nightly.aliases.version("3").tags[GATE].startswith(f"refused: {why}")
    assert last(nightly)["olora.decision"] == "refused"
    again = nightly.call()
    assert "nothing changed since version 3" in again, again

    (nightly.data / "2-poison.jsonl").unlink()
    assert "nothing changed since version 2" in nightly.call()
    registry.main(["rollback", "nightly", "--tracking-uri", nightly.aliases.uri])
    assert nightly.aliases.current() == {"champion": "1", "challenger": "3"}
    assert "rolled back" in nightly.call(), (
        "a version that was rolled back does not come back by itself"
    )
    assert nightly.made() == 3


def longer(model: Path) -> dict[str, Any]:
    """Settings with which the tiny model learns the answer to each question."""
    settings: dict[str, Any] = project.settings(model, model)["train"]
    return settings | {
        "steps": 60,
        "eval_every": 20,
        "checkpoint_every": 20,
        "global_batch": 4,
        "lr": 1e-2,
    }


def corrections(file: Path, words: Sequence[str], mark: str, wrong: bool = False) -> None:
    """Write pairs that prefer a word's answer to another word's; the other way round if `wrong`."""
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as out:
        for number in range(24):
            word = words[number % len(words)]
            answers = [ANSWERS[word], ANSWERS["one" if word != "one" else "two"]]
            if wrong:
                answers.reverse()
            row = {
                "question": f"{mark}{word} {number}",
                "chosen": answers[0],
                "rejected": answers[1],
            }
            out.write(json.dumps(row) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["base", "champion"])
def test_nights_of_corrections_are_judged_by_held_out_pairs_rows_and_guard(
    folder: Path, model: Path, origin: str
) -> None:
    pairs = folder / "corrections"
    corrections(pairs / "0.jsonl", ["one", "two"], ".")
    corrections(folder / "heldout-pairs.jsonl", ["one", "two", "three"], "-")
    data = {
        "train": [{"path": str(folder / "data")}, {"path": str(pairs)}],
        "eval": [
            {"path": str(folder / "heldout.jsonl")},
            {"path": str(folder / "heldout-pairs.jsonl")},
        ],
        "max_length": 96,
    }
    settings = {"data": data, "train": {**longer(model), "lr": 2e-3, "chosen": 0.1}}
    gate = {"guard": [{"path": str(folder / "guard.jsonl")}], "guard_margin": 9.0}
    write(folder / "guard.jsonl", [("-four", "4444")] * 24)
    retrain = {"from": origin, "replay": 0.5}
    nightly = Nightly(folder, model, retrain=retrain, gate=gate, **settings)
    log = nightly.call()
    assert nightly.aliases.current() == {"champion": "1"}, log

    corrections(pairs / "1.jsonl", ["three"], ".")
    log = nightly.call()
    assert nightly.aliases.current() == {"champion": "2", "previous": "1"}, log
    verdict = nightly.aliases.version("2").tags[GATE]
    assert verdict.startswith("passed: eval/pairs/loss"), log
    for name in ("chosen answers", "other rows", "guard"):
        assert f"; {name}: eval/loss" in verdict
    metrics = nightly.decisions()[-1].data.metrics
    assert metrics["challenger/eval/pairs/preferred"] >= 0.8

    corrections(pairs / "2.jsonl", ["one", "two", "three"], "?", wrong=True)
    log = nightly.call()
    assert nightly.aliases.current()["champion"] == "2", log
    assert "refused: " in log, log


@pytest.mark.slow
def test_a_night_that_forgets_is_shrunk_also_if_it_is_killed(folder: Path, model: Path) -> None:
    """The third word is learned, and the first two are the guard."""
    guard = {"guard": [{"path": str(folder / "guard.jsonl")}], "guard_margin": 1.0}
    settings = {"retrain": {"from": "champion", "replay": 0.0}, "export": {"merged": False}}
    nightly = Nightly(folder, model, train=longer(model), gate=guard, **settings)
    write(folder / "guard.jsonl", [(f"-{word}", ANSWERS[word]) for word in ("one", "two")] * 12)
    write(folder / "heldout.jsonl", [("-three", ANSWERS["three"])] * 24)
    nightly.call()
    nightly.add("1-more", ["three"], 40)
    nightly.call_until("trying 0.5 of the change of version 2")
    nightly.call_until("measuring version 3 on the guard rows")
    log = nightly.call()
    assert nightly.aliases.current() == {"champion": "3", "previous": "1"}, log
    whole = nightly.aliases.version("2")
    part = nightly.aliases.version("3")
    assert whole.tags[GATE].endswith("; 0.5 of its change passes")
    assert part.tags[GATE].startswith("passed: shrunk to 0.5: eval/loss")
    assert part.tags["olora.eval_loss"] > whole.tags["olora.eval_loss"]
    decisions = [run.data.tags["olora.challenger"] for run in nightly.decisions()]
    assert decisions == ["nightly/1", "nightly/3"]


KILLED_AT = {
    "in training": "step 6/12",
    "while it is exported": "exporting and checking the adapter",
    "while it is registered": "registering the merged model",
    "after it is registered": "registered:",
    "while it is measured": "measuring version 2",
}
DECIDED = "passed: eval/loss"


@pytest.mark.slow
def test_killed_at_each_stage_and_called_again(folder: Path, model: Path) -> None:
    nightly = Nightly(folder, model, gate={"must_improve_by": -9.0, "anchor": 9.0})
    nightly.call()
    nightly.add("1-more", ["three"], 40)
    for line in KILLED_AT.values():
        nightly.call_until(line)
        assert nightly.aliases.current()["champion"] == "1"
    log = nightly.call_until(DECIDED)
    assert nightly.aliases.current() == {"champion": "2", "previous": "1"}, log
    assert "nothing changed since version 2" in nightly.call()
    assert nightly.made() == 2
    assert [run.data.tags["olora.decision"] for run in nightly.decisions()] == [
        "promoted",
        "promoted",
        "unchanged",
    ]
    assert nightly.decisions()[1].info.status == "FINISHED", "what was left to record is recorded"
