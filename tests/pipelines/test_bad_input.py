"""Each mistake of a user: one line that names it, exit code 2, nothing half-written, no traceback."""

import json
import shutil
import socket
from collections.abc import Callable
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
    done = project.finetune(project.write_config(corpus, project.settings(corpus, tiny_model)))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "train.jsonl:2" in last


def change(section: str, name: str, value: Any) -> Callable[[Tree], None]:
    """An edit of a config tree."""

    def edit(tree: Tree) -> None:
        tree[section][name] = value

    return edit


CONFIG_MISTAKES = {
    "unknown field": (change("adapter", "rnk", 3), ["adapter.rnk", "adapter.rank"]),
    "no such folder": (change("model", "name", "/no/such/model"), ["model.name", "/no/such/model"]),
    "rank too large": (change("adapter", "rank", 65), ["adapter.rank=65", "64 x 64"]),
    "unknown target": (change("adapter", "targets", ["qkv"]), ["'qkv'", "q_proj"]),
    "unknown scorer": (
        change("evaluation", "scorer", "bleurt"),
        ["evaluation.scorer", "bleurt", "exact_match"],
    ),
}


@pytest.mark.parametrize("case", CONFIG_MISTAKES)
def test_mistakes_in_the_config(case: str, tiny_model: Path, corpus: Path) -> None:
    edit, expected = CONFIG_MISTAKES[case]
    tree = project.settings(corpus, tiny_model)
    edit(tree)
    error = refused(project.write_config(corpus, tree))
    assert all(part in error for part in expected), error


def write(text: str) -> Callable[[Path], None]:
    """A spoiler of a file: replaces its content."""

    def spoil(file: Path) -> None:
        file.write_text(text)

    return spoil


def chat(user: str, answer: str) -> str:
    return json.dumps(
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}
    )


DATA_MISTAKES = {
    "missing file": (lambda file: file.unlink(), ["train.jsonl", "data.train.0.path"]),
    "empty corpus": (write(""), ["train.jsonl", "no rows"]),
    "half copied": (
        write(chat("a", "b") + "\n" + chat("c", "d")[:-9]),
        ["train.jsonl:2: the file ends in the middle"],
    ),
    "no such column": (write('{"question": "a"}\n'), ["train.jsonl:1", "question", "format"]),
    "no answer": (write(chat("a", "") + "\n"), ["train.jsonl:1"]),
}


@pytest.mark.parametrize("case", DATA_MISTAKES)
def test_mistakes_in_the_data(case: str, tiny_model: Path, corpus: Path) -> None:
    spoil, expected = DATA_MISTAKES[case]
    spoil(corpus / "train.jsonl")
    error = refused(project.write_config(corpus, project.settings(corpus, tiny_model)))
    assert all(part in error for part in expected), error


def test_model_without_weights(tiny_model: Path, corpus: Path) -> None:
    shutil.copytree(tiny_model, corpus / "model")
    (corpus / "model" / "model.safetensors").rename(corpus / "model" / "pytorch_model.bin")
    error = refused(project.write_config(corpus, project.settings(corpus, corpus / "model")))
    assert "pytorch_model*.bin" in error
    assert "safetensors" in error


def test_tokenizer_without_end_token(tiny_model: Path, corpus: Path) -> None:
    shutil.copytree(tiny_model, corpus / "model")
    file = corpus / "model" / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key != "eos_token"}
    file.write_text(json.dumps(kept))
    error = refused(project.write_config(corpus, project.settings(corpus, corpus / "model")))
    assert "end token" in error


def test_storage_that_cannot_be_written(tiny_model: Path, corpus: Path) -> None:
    (corpus / "file").write_text("")
    tree = project.settings(corpus, tiny_model, run__storage=str(corpus / "file" / "below"))
    assert "run.storage" in refused(project.write_config(corpus, tree))


def test_mlflow_server_that_is_not_there(tiny_model: Path, corpus: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    error = refused(
        project.write_config(corpus, project.settings(corpus, tiny_model)),
        f"tracking.uri=http://127.0.0.1:{port}",
    )
    assert "tracking.uri" in error


def test_an_address_of_a_dashboard_is_refused_before_the_model_is_fetched(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")  # as `ray job submit` wants it
    error = refused(project.write_config(corpus, project.settings(corpus, Path("/no/such/model"))))
    assert "RAY_ADDRESS=http://127.0.0.1:8265" in error
