"""What a model answers is kept line by line, and leads back to its row and to the group of the row."""

import json
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.load import build, override
from olora_ray.config.schema import Config
from olora_ray.evaluation import held_out, results
from olora_ray.evaluation.groups import group_numbers
from olora_ray.evaluation.results import Evaluation
from olora_ray.evaluation.targets import Target
from olora_ray.pipeline.base import open_base
from olora_ray.tokens import prepare
from tests.pipelines.project import make_model, settings
from tests.said import said


@pytest.fixture
def config(tmp_path: Path) -> Config:
    with (tmp_path / "test.jsonl").open("w") as out:
        for number in range(9):
            question, answer = f"after {number}?", str(number + 1)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages, "user": f"p{number // 4}"}) + "\n")
    tree = settings(tmp_path, make_model(tmp_path / "model"), gate={"group": "user"})
    tree["data"]["eval"] = [{"path": str(tmp_path / "test.jsonl")}]
    tree["evaluation"] |= {"scorer": "exact_match", "rows": 7}
    return build(tree)


def test_answers_lead_to_their_rows_and_rows_to_people(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        held_out, "map_over_actors", lambda make, works, config: list(map(make(), works))
    )  # without Ray
    base = open_base(config)
    store = prepare.prepare(config, base.spec, "eval")
    found, answers = held_out.measure_and_answer(base, None, store, config)
    lines = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(found.losses) == 9
    assert len(answers) == 7
    for item in answers:
        name, _, line = item.origin.rpartition(":")
        assert name.endswith("test.jsonl")
        assert item.reference == lines[int(line) - 1]["messages"][-1]["content"]
        assert item.scores == {"exact_match": 0.0}  # a random model
    assert found.scores["exact_match"] == {item.row: 0.0 for item in answers}
    groups = group_numbers("user", prepare.plan_here(config, base.spec, "eval"), found.origins)
    people = [lines[place]["user"] for _, place in found.origins]
    assert groups is not None
    assert len(set(zip(groups, people, strict=True))) == len(set(people)) == len(set(groups)) > 1

    target = Target("runs/small", base.model, None, config)
    request = results.read(["runs/small", "--out", str(tmp_path / "out")], "")
    results.write(request, [Evaluation(target, found, {}, groups, answers)], {}, None)
    kept = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(item["origin"], item["text"], item["reference"]) for item in kept] == [
        (item.origin, item.text, item.reference) for item in answers
    ]


def test_a_group_that_is_no_column_is_refused_before_anything_is_measured(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(results, "measure_and_answer", lambda *given: measured.append(given))
    mistaken = override(config, {"gate.group": "person"})
    with pytest.raises(UserError, match=r"gate\.group: no held-out row has a column 'person'"):
        results.evaluate(Target("runs/small", open_base(config).model, None, mistaken), {}, None)
    assert not measured


def test_without_a_scorer_there_is_no_file_of_answers(config: Config, tmp_path: Path) -> None:
    request = results.read(["m", "--out", str(tmp_path / "out")], "")
    base = open_base(config).model
    results.write(request, [results.Evaluation(Target("m", base, None, config), None, {})], {}, None)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["evaluation.json"]


def test_answers_of_an_earlier_evaluation_are_not_taken_for_those_of_this_one(config: Config, tmp_path: Path) -> None:
    request = results.read(["m", "--out", str(tmp_path)], "")
    (tmp_path / "answers.jsonl").write_text("{}\n")
    with said() as lines:
        results.write(request, [Evaluation(Target("m", open_base(config).model, None, config), None, {})], {}, None)
    expected = f"{tmp_path}/answers.jsonl: is of an earlier evaluation; this one has scored no answers"
    assert [line for line in lines if expected in line]
    assert (tmp_path / "answers.jsonl").read_text() == "{}\n"
