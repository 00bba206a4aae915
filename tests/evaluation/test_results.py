"""The lines, files and MLflow runs of an evaluation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.config import command_line
from olora_ray.config.load import build, override
from olora_ray.config.schema import Config
from olora_ray.evaluation import held_out, results
from olora_ray.evaluation.groups import group_names
from olora_ray.evaluation.lm_eval_tasks import TaskResult
from olora_ray.evaluation.results import EvalRequest, EvalResult, differences
from olora_ray.evaluation.rows import RowResults
from olora_ray.evaluation.targets import Target
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import open_base
from olora_ray.tokens import prepare
from tests import mlflow_database, tiny
from tests.pipelines.project import make_model, settings
from tests.refused import refused
from tests.said import said


def evaluation(name: str, right: tuple[float, ...], data: str = "store") -> EvalResult:
    target = Target(name, BaseModel(name, f"/models/{name}", "digest"), None, tiny.config())
    share = sum(right) / len(right)
    task = TaskResult(f"validation[:{len(right)}]", {"acc": share}, {"acc": 0.1}, {"acc": right})
    losses, scores = (4.0, 6.0 * (1 + share)), {"exact_match": dict(enumerate(right[:2]))}
    held_out = RowResults(data, (2, 3), losses, scores, ((0, 0), (0, 1)))
    return EvalResult(target, held_out, {"arc_easy": task})


def test_one_model_is_a_table_of_values_and_errors() -> None:
    found = results.lines([evaluation("base", (1.0, 0.0, 1.0, 1.0))], {})
    assert found == [
        "model: base",
        "",
        "metric            rows              value  stderr",
        "-------------------------------------------------",
        "eval/loss         held-out[:2]     2.9000",
        "eval/perplexity   held-out[:2]    18.1741",
        "eval/exact_match  held-out[:2]     0.5000",
        "arc_easy/acc      validation[:4]   0.7500  0.1000",
    ]


def test_two_models_stand_side_by_side_with_intervals() -> None:
    pair = evaluation("tuned", (1.0, 1.0, 1.0, 0.0)), evaluation("base", (0.0, 1.0, 0.0, 0.0))
    found = differences(*pair)
    assert list(found) == ["eval/loss", "eval/perplexity", "eval/exact_match", "arc_easy/acc"]
    accuracy = found["arc_easy/acc"]
    assert (accuracy.mean, accuracy.low, accuracy.high) == pytest.approx(
        (0.5, -0.42, 1.42), abs=0.05
    )
    lines = results.lines(pair, found)
    assert lines[:2] == ["first:  tuned", "second: base"]
    assert lines[-1].split()[:5] == [
        "arc_easy/acc",
        "validation[:4]",
        "0.7500",
        "0.2500",
        "+0.5000",
    ]


def test_a_score_that_no_row_has_of_both_models_costs_nothing_but_its_interval() -> None:
    """A scorer may leave a score out; once this lost all results with an error."""
    pair = [evaluation("tuned", (1.0, 1.0)), evaluation("base", (0.0, 1.0))]
    for number, each in enumerate(pair):
        scores = {**each.held_out.scores, "first": {number: 1.0}, f"of {number}": {0: 1.0}}
        pair[number] = replace(each, held_out=replace(each.held_out, scores=scores))
    found = differences(*pair)
    assert list(found) == ["eval/loss", "eval/perplexity", "eval/exact_match", "arc_easy/acc"]
    [line] = [line for line in results.lines(pair, found) if line.startswith("eval/first")]
    assert line.endswith("not paired")
    [line] = [
        line for line in results.lines(pair, found) if line.startswith("eval/of 1")
    ]  # only the second has it
    assert line.split()[2:] == ["held-out[:1]", "-", "1.0000", "-", "not", "paired"]


def test_pairs_of_a_model_that_names_no_base_need_one_from_the_user() -> None:
    merged, base = evaluation("merged", (1.0,)).target, evaluation("base", (1.0,)).target
    alone = command_line.loaded_for("merged", {})
    with refused("merged: preference pairs are measured against a base model"):
        results.base_of_pairs([merged], alone)
    assert results.base_of_pairs([merged, base], alone) == base.base


def test_results_are_written_where_asked(tmp_path: Path) -> None:
    pair = evaluation("tuned", (1.0, 1.0)), evaluation("base", (0.0, 1.0))
    words = f"tuned base --tasks arc_easy --limit 2 --scorer exact_match --out {tmp_path}"
    request = results.read_request(words.split(), "")
    assert (request.changes, request.tasks) == ({"evaluation.scorer": "exact_match"}, ("arc_easy",))
    results.write_results(request, pair, differences(*pair), None)
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert [item["model"] for item in tree["models"]] == ["tuned", "base"]
    assert tree["models"][0]["metrics"]["arc_easy/acc"] == 1.0
    assert tree["models"][0]["stderr"] == {"arc_easy/acc": 0.1}
    assert tree["differences"]["arc_easy/acc"]["mean"] == 0.5
    assert tree["limit"] == 2


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({}, (), "base: no rows"),
        ({"evaluation__scorer": "nonsense"}, ("boolq",), "no scorer is called"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_starts(
    changes: dict[str, Any], names: tuple[str, ...], message: str
) -> None:
    request = EvalRequest(("base",), None, {}, names, None, None, None)
    with refused(message):
        results.check_request(request, tiny.config(**changes))


def test_a_scorer_without_rows_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/evaluation.md promises it; with tasks alone the answers were once missing without a line."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    request = EvalRequest(("base",), None, {}, ("boolq",), None, None, None)
    with said() as lines:
        results.check_request(request, tiny.config())
    assert not lines
    with said() as lines:
        results.check_request(request, tiny.config(evaluation__scorer="exact_match"))
    assert len(lines) == 1
    assert "evaluation.scorer: no answers" in lines[0]


def test_without_a_config_nothing_is_tracked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = evaluation("base", (1.0,)).target
    request = EvalRequest((str(tmp_path),), None, {}, ("boolq",), None, None, None)
    assert results.tracking_address(request, [target]) is None
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_database.place(tmp_path)}/mlflow.db"
    )
    assert results.tracking_address(request, [target]) == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    with (tmp_path / "test.jsonl").open("w") as out:
        for number in range(9):
            question, answer = f"after {number}?", str(number + 1)
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            out.write(json.dumps({"messages": messages, "user_id": f"p{number // 4}"}) + "\n")
    tree = settings(tmp_path, make_model(tmp_path / "model"), gate={"group": "user_id"})
    tree["data"]["eval"] = [{"path": str(tmp_path / "test.jsonl")}]
    tree["evaluation"] |= {"scorer": "exact_match", "rows": 7}
    tree["train"]["objective"] = "tokens"
    return build(tree)


def test_answers_lead_to_their_rows_and_rows_to_people(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        held_out, "map_over_actors", lambda make, works, config: list(map(make(), works))
    )  # without Ray
    base = open_base(config)
    store = prepare.prepare(config, base.spec, "eval")
    found, answers = held_out.measure(base, None, store, config)
    lines = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(found.losses) == 9
    assert len(answers) == 7
    for item in answers:
        name, _, line = item.origin.rpartition(":")
        assert name.endswith("test.jsonl")
        assert item.reference == lines[int(line) - 1]["messages"][-1]["content"]
        assert item.scores == {"exact_match": 0.0}  # a random model
    assert found.scores["exact_match"] == {item.row: 0.0 for item in answers}
    groups = group_names("user_id", prepare.plan_here(config, base.spec, "eval"), found.origins)
    people = [lines[place]["user_id"] for _, place in found.origins]
    assert len(set(zip(groups, people, strict=True))) == len(set(people)) == len(set(groups)) > 1

    target = Target("runs/small", base.model, None, config)
    request = results.read_request(["runs/small", "--out", str(tmp_path / "out")], "")
    results.write_results(request, [EvalResult(target, found, {}, answers)], {}, None)
    kept = [
        json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    ]
    assert [(item["origin"], item["text"], item["reference"]) for item in kept] == [
        (item.origin, item.text, item.reference) for item in answers
    ]


def test_a_group_that_is_no_column_is_refused_before_anything_is_measured(config: Config) -> None:
    mistaken = override(config, {"gate.group": "person"})
    target = Target("runs/small", open_base(config).model, None, mistaken)
    with refused("gate.group"):
        results.evaluate(target, ClusterFacts((), False, 1, 1), {}, None)
    assert not ray.is_initialized()


def test_answers_of_an_earlier_evaluation_are_not_taken_for_those_of_this_one(
    config: Config, tmp_path: Path
) -> None:
    request = results.read_request(["m", "--out", str(tmp_path)], "")
    found = [EvalResult(Target("m", open_base(config).model, None, config), None, {})]
    results.write_results(request, found, {}, None)
    assert not (tmp_path / "answers.jsonl").exists()
    (tmp_path / "answers.jsonl").write_text("{}\n")
    with said() as lines:
        results.write_results(request, found, {}, None)
    expected = f"{tmp_path}/answers.jsonl: left by an earlier evaluation"
    assert [line for line in lines if expected in line]
    assert (tmp_path / "answers.jsonl").read_text() == "{}\n"
