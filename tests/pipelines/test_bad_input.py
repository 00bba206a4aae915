"""Each mistake of a user: one line that names it, exit code 2, nothing half-written, no traceback."""

import json
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from pipelines import finetune
from tests import mlflow_database
from tests.pipelines import project

Tree = dict[str, Any]


def refused(file: Path, *arguments: str) -> str:
    """The error of a command that must fail; it must leave no run folder."""
    mlflow_database.place(file.parent / "runs")
    with pytest.raises(UserError) as caught:
        finetune.main([str(file), *arguments])
    assert not (file.parent / "runs" / "small").exists()
    return str(caught.value)


@pytest.mark.ray
@pytest.mark.slow  # in make test: tests/tokens/test_store.py, through Ray's tasks
def test_a_mistake_is_one_line_and_an_exit_code(tiny_model: Path, corpus: Path) -> None:
    (corpus / "train.jsonl").write_text(
        f"{chat('a', 'b')}\n{{broken\n"
    )  # which is found when Ray runs
    done = project.finetune(
        project.write_config(corpus, project.settings(corpus, tiny_model)), code=2
    )
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "train.jsonl:2" in last


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown field": ({"adapter__rnk": 3}, ["adapter.rnk", "adapter.rank"]),
    "no such folder": ({"model__name": "/no/such/model"}, ["model.name", "/no/such/model"]),
    "rank too large": ({"adapter__rank": 65}, ["adapter.rank=65", "64 x 64"]),
    "unknown target": ({"adapter__targets": ["qkv"]}, ["'qkv'", "q_proj"]),
    "unknown scorer": ({"evaluation__scorer": "bleurt"}, ["evaluation.scorer", "exact_match"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_the_config(case: str, tiny_model: Path, corpus: Path) -> None:
    changes, expected = MISTAKES[case]
    error = refused(project.write_config(corpus, project.settings(corpus, tiny_model, **changes)))
    assert all(part in error for part in expected), error


def chat(user: str, answer: str) -> str:
    return json.dumps(
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}
    )


def test_storage_that_cannot_be_written(tiny_model: Path, corpus: Path) -> None:
    (corpus / "file").write_text("")
    tree = project.settings(corpus, tiny_model, run__storage=str(corpus / "file" / "below"))
    assert "run.storage" in refused(project.write_config(corpus, tree))


def test_an_address_of_a_dashboard_is_refused_before_the_model_is_fetched(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")  # as `ray job submit` wants it
    error = refused(project.write_config(corpus, project.settings(corpus, Path("/no/such/model"))))
    assert "RAY_ADDRESS=http://127.0.0.1:8265" in error
