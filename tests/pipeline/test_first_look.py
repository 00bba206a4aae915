"""Mistakes in the data are told before anything heavy is imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_ray.common.errors import UserError
from olora_ray.config.load import build
from olora_ray.config.schema import Config
from olora_ray.pipeline import first_look
from tests.pipelines import project


def config(folder: Path, train: Any, **data: Any) -> Config:
    """A config of a model that is not there, on this training source."""
    run = {"name": "a", "storage": str(folder / "runs")}
    return build({"run": run, "model": {"name": "/no/such/model"}, "data": {"train": train, **data}})


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        first_look.check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(*rows: Any) -> Callable[[Path], None]:
    """A writer of a file of JSON lines."""
    return lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in rows)) and None


MISTAKES: dict[str, tuple[str, Callable[[Path], None], dict[str, Any], list[str]]] = {
    "no such file": ("a.jsonl", lambda file: None, {}, ["data.train.0.path: ", "a.jsonl: no such file or folder"]),
    "unknown kind": ("a.xyz", lambda file: file.write_text("x") and None, {}, ["data.train.0.path: ", "unknown kind"]),
    "empty": ("a.jsonl", lambda file: file.write_text("") and None, {}, ["data.train.0.path: ", "has no rows"]),
    "unknown field": (
        "a.jsonl",
        lines({}),
        {"fields": {"quest": "q"}},
        ["data.train.0.fields: format messages has no field 'quest'"],
    ),
    "wrong columns": (
        "a.jsonl",
        lines(*[{"question": "q", "answer": "a"}] * 40),
        {"format": "prompt_completion"},
        [
            "none of the 28 rows",
            "a.jsonl:1: missing_field",
            "; in data.train.0 set fields: {prompt: question, completion: answer}",
        ],
    ),
    "another format": (
        "a.jsonl",
        lines({"instruction": "q", "output": "a"}),
        {},
        ["none of the 1 rows that were", "a.jsonl:1: missing_field", "; in data.train.0 set format: alpaca"],
    ),
    "columns of a parquet file": (
        "a.parquet",
        lambda file: parquet.write_table(pa.Table.from_pylist([{"q": "x", "answer": "y", "id": 1}]), file),
        {"format": "alpaca"},
        ["field 'instruction' is not there; the row has q, answer, id"],
    ),
    "not compressed": ("a.jsonl.gz", lines({}), {}, ["a.jsonl.gz: not a readable gzip file"]),
    "roles of sharegpt": (
        "a.jsonl",
        lines({"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]}),
        {},
        ["unknown role 'human'", "'human' is a role of format sharegpt"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_source_of_which_no_row_can_be_used(case: str, tmp_path: Path) -> None:
    name, write, source, expected = MISTAKES[case]
    write(tmp_path / name)
    message = refusal(config(tmp_path, [{"path": str(tmp_path / name), **source}]))
    assert all(part in message for part in expected), message


def test_held_out_sources_are_looked_at_too(tmp_path: Path) -> None:
    good = project.make_corpus(tmp_path / "good.jsonl", 3)
    lines({"text": "x"})(tmp_path / "bad.jsonl")
    message = refusal(config(tmp_path, str(good), eval=[str(good), str(tmp_path / "bad.jsonl")]))
    assert message.startswith("data.eval.1: none of the 1 rows that were looked at can be used; ")


@pytest.mark.parametrize("place", [0, 20, 39])
def test_one_usable_row_is_enough_for_the_first_look(tmp_path: Path, place: int) -> None:
    good = json.loads(project.make_corpus(tmp_path / "good.jsonl", 1).read_text())
    rows: list[Any] = [{"x": 1}] * 40
    rows[place] = good
    lines(*rows)(tmp_path / "a.jsonl")
    first_look.check(config(tmp_path, str(tmp_path / "a.jsonl")))


def test_a_finished_run_needs_its_data_no_more(tmp_path: Path) -> None:
    gone = config(tmp_path, str(tmp_path / "gone.jsonl"))
    assert "no such file" in refusal(gone)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "result.json").write_text("{}")
    first_look.check(gone)


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_it_comes_before_torch_ray_and_the_model(tmp_path: Path, flags: tuple[str, ...]) -> None:
    tree = project.settings(tmp_path, Path("/no/such/model"))
    file = project.write_config(tmp_path, tree)
    code = (
        "import sys\nfrom pipelines import finetune\nfrom olora_ray.common.errors import UserError\n"
        "try: finetune.main(sys.argv[1:])\nexcept UserError as error: print(error)\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'mlflow', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), *flags], capture_output=True, text=True, check=True, cwd=project.ROOT
    )
    message, imported = done.stdout.splitlines()
    assert message == f"data.train.0.path: {tmp_path}/train.jsonl: no such file or folder"
    assert imported == "[]"
