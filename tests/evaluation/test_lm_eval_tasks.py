"""Tasks load from a local folder as from the hub, and each mistake of a user is one line."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.evaluation import lm_eval_tasks
from tests.evaluation import sets
from tests.refused import refused

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.write(tmp_path_factory.mktemp("sets"))


def load(names: list[str], folder: Path) -> dict[str, Any]:
    return lm_eval_tasks.load_tasks(names, str(folder))


def test_rows_of_a_local_folder_are_read_as_the_task_says(folder: Path) -> None:
    found = load(["arc_easy", "boolq"], folder)
    arc, boolq = found["arc_easy"], found["boolq"]
    assert len(arc.eval_docs) == len(boolq.eval_docs) == sets.ROWS
    first = arc.eval_docs[0]
    assert arc.doc_to_text(first) == "Question: What comes after 0?\nAnswer:"
    assert arc.doc_to_choice(first)[arc.doc_to_target(first)] == "1"
    assert [boolq.doc_to_target(row) for row in boolq.eval_docs] == [1, 0] * (sets.ROWS // 2)


def test_a_task_is_named_as_its_folder_too(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "arc_easy").symlink_to(folder / "ai2_arc" / "ARC-Easy")
    assert len(load(["arc_easy"], tmp_path)["arc_easy"].eval_docs) == sets.ROWS


def test_rows_are_kept_only_of_metrics_that_are_their_mean() -> None:
    """lambada's rows are log-likelihoods, and its perplexity is an exponential; the interval was once of the former."""
    likely = [-1.0, -2.5, -0.5]
    results = {"alias": "lambada_openai", "acc,none": 2 / 3, "perplexity,none": math.exp(4.0 / 3)}
    samples = [
        {"doc_id": number, "filter": "none", "acc": int(value > -2), "perplexity": value}
        for number, value in enumerate(likely)
    ]
    task = SimpleNamespace(has_test_docs=lambda: True, config=SimpleNamespace(test_split="test"))
    found = lm_eval_tasks._result(task, results, samples)
    assert found.metrics == {"acc": 2 / 3, "perplexity": math.exp(4.0 / 3)}
    assert found.values == {"acc": (1.0, 0.0, 1.0)}
    assert found.rows == "test[:3]"
    del samples[1]["acc"]  # nor of one that a row has not: with another model it may be another row
    assert not lm_eval_tasks._result(task, results | {"acc,none": 1.0}, samples).values


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (["piqa"], "{folder}", "no data of piqa"),
        (["arc_easy"], "{folder}/nowhere", "nowhere: no such folder"),
        (["arc_easy"], "package://no_such_package/sets", "'no_such_package' is not installed"),
        (["arc_easy"], None, "--tasks arc_easy"),
    ],
)
def test_data_that_is_not_there_is_one_line(
    folder: Path, names: list[str], data: str | None, message: str
) -> None:
    with refused(message):
        lm_eval_tasks.load_tasks(names, data and data.format(folder=folder))


@pytest.mark.slow  # reads all tasks of lm-eval
def test_an_unknown_task_is_named_with_what_it_may_have_been() -> None:
    with refused("--tasks"):
        lm_eval_tasks.load_tasks(["arc_esay"], None)
    with refused("--tasks"):
        lm_eval_tasks.load_tasks(["mmlu"], None)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with refused("pip install 'olora-ray[eval]"):
        lm_eval_tasks.load_tasks(["arc_easy"], None)
