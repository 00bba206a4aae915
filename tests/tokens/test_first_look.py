"""Mistakes in the data are reported before anything heavy is imported."""

import gzip
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
from olora_ray.config.command_line import resolved
from olora_ray.config.load import build, override
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens import prepare, preview
from olora_ray.tokens.plan import Split
from tests import tiny
from tests.pipelines import project
from tests.said import said
from tests.tokens import helpers


def config(folder: Path, train: Any, **data: Any) -> Config:
    """A config of a missing model, with this training source."""
    run = {"name": "a", "storage": str(folder / "runs")}
    return build(
        {"run": run, "model": {"name": "/no/such/model"}, "data": {"train": train, **data}}
    )


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        tiny.read_as(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(*rows: Any) -> Callable[[Path], None]:
    """Return a function that writes a file of JSON lines."""
    return lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in rows)) and None


ALPACA = {"instruction": "q", "output": "a"}
MISTAKES: dict[str, tuple[str, Callable[[Path], None], dict[str, Any], list[str]]] = {
    "no such file": (
        "a.jsonl",
        lambda file: None,
        {},
        ["data.train.0.path: ", "a.jsonl: no such file or folder"],
    ),
    "rows in an object": (
        "a.json",
        lambda file: file.write_text(json.dumps({"data": [ALPACA]})) and None,
        {},
        ["a.json: expected a list of rows", "write the list of rows alone, or as .jsonl"],
    ),
    "compressed": (
        "a.jsonl",
        lambda file: file.write_bytes(gzip.compress(json.dumps(ALPACA).encode())) and None,
        {},
        ["a.jsonl:1: not_utf8: the file is compressed: name it .jsonl.gz"],
    ),
    "lines of JSON as text": (
        "a.txt",
        lines(ALPACA, ALPACA),
        {},
        ["a.txt:1: bad_text: its lines are JSON objects: name the file .jsonl"],
    ),
    "unknown field": (
        "a.jsonl",
        lines({}),
        {"format": "messages", "fields": {"quest": "q"}},
        ["data.train.0.fields: format messages has no field 'quest'"],
    ),
    "wrong columns": (
        "a.jsonl",
        lines(*[{"question": "q", "answer": "a"}] * 40),
        {"format": "prompt_completion"},
        [
            "none of the 28 rows",
            "a.jsonl:1: missing_field",
            "; remove format and fields to have them detected",
        ],
    ),
    "columns of a parquet file": (
        "a.parquet",
        lambda file: parquet.write_table(
            pa.Table.from_pylist([{"q": "x", "answer": "y", "id": 1}]), file
        ),
        {"format": "alpaca"},
        ["field 'instruction' is missing; the row has q, answer, id"],
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
    lines({"x": "text"})(tmp_path / "bad.jsonl")
    message = refusal(config(tmp_path, str(good), eval=[str(good), str(tmp_path / "bad.jsonl")]))
    assert message.startswith("data.eval.1: ")
    assert "bad.jsonl:1: no format has these columns" in message


@pytest.mark.parametrize("place", [0, 20, 39])
def test_one_usable_row_is_enough_for_the_first_look(tmp_path: Path, place: int) -> None:
    good = json.loads(project.make_corpus(tmp_path / "good.jsonl", 1).read_text())
    rows: list[Any] = [{"x": 1}] * 40
    rows[place] = good
    lines(*rows)(tmp_path / "a.jsonl")
    tiny.read_as(config(tmp_path, str(tmp_path / "a.jsonl")))


def test_a_finished_run_needs_its_data_no_more(tmp_path: Path) -> None:
    gone = config(tmp_path, str(tmp_path / "gone.jsonl"))
    assert "no such file" in refusal(gone)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "result.json").write_text("{}")
    tiny.read_as(gone)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("tatsu-lab/alpaca", "; if it is a data set of the hub, write hf://tatsu-lab/alpaca"),
        ("data/a.txt", ""),
    ],
)
def test_a_name_of_the_hub_is_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    told = refusal(resolved(config(tmp_path, path), tmp_path))
    assert told == f"data.train.0.path: {tmp_path}/{path}: no such file or folder{hint}"


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
        [sys.executable, "-c", code, str(file), *flags],
        capture_output=True,
        text=True,
        check=True,
        cwd=project.ROOT,
    )
    message, imported = done.stdout.splitlines()
    assert message == f"data.train.0.path: {tmp_path}/train.jsonl: no such file or folder"
    assert imported == "[]"


GERMAN = "instruction;answer\r\nWie groß?;5 €, „groß“\r\nWarum?;darum\r\n".encode("cp1252")
SET = {"format": "alpaca", "fields": {"output": "answer"}}
FOUND = "data.train.0: alpaca rows in semicolon csv, cp1252; output: answer"


def test_what_is_found_is_said_once_and_is_what_one_could_have_set(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(GERMAN)
    with said() as told:
        found = tiny.read_as(config(tmp_path, str(path)))
        preview.describe(found, helpers.spec())
    assert told == [FOUND]
    given = config(tmp_path, {"path": str(path), **SET})
    with said() as told:
        assert tiny.read_as(given) == given == found
    assert told == [f"data.train.0: {path} is read as semicolon csv, cp1252"]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_preparation_finds_the_same_and_makes_the_same_store(
    split: Split, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_bytes(GERMAN)
    source = {"path": str(tmp_path / "a.csv")}
    with said() as told:
        store = prepare.prepare(config(tmp_path, source, eval=[source]), helpers.spec(), split)
    assert FOUND.replace("train", split) in told
    given = prepare.plan_here(
        config(tmp_path, source | SET, eval=[source | SET]), helpers.spec(), split
    )
    assert store.digest == given.digest()
    inputs: Any = given.inputs()
    assert inputs["sources"][0]["files"][0][0] == "semicolon csv, cp1252"


@pytest.mark.parametrize("now", [{}, SET])
def test_a_run_continues_whether_its_format_was_set_or_found(
    now: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(GERMAN)
    for before in ({}, SET):
        tiny.claimed(tiny.read_as(config(tmp_path, {"path": str(path), **before})))
        (tmp_path / "runs/a/checkpoints/step-0000001").mkdir(parents=True, exist_ok=True)
        again = tiny.read_as(config(tmp_path, {"path": str(path), **now}))
        RunFolder(again.folder()).check(again)
    # A finished run has its format, and does not detect it again.
    (tmp_path / "runs/a/result.json").write_text("{}")
    path.unlink()
    again = tiny.read_as(config(tmp_path, {"path": str(path), **now}))
    kept = RunFolder(again.folder()).check(again).kept
    assert kept.filled(again).data.train[0].fields == SET["fields"]


def test_what_is_found_meets_the_other_settings(tmp_path: Path) -> None:
    lines({"text": "a document"})(tmp_path / "a.jsonl")
    asked = config(tmp_path, str(tmp_path / "a.jsonl"), eval=[str(tmp_path / "a.jsonl")])
    scored = override(
        asked, {"evaluation.scorer": "exact_match", "gate.metric": "eval/exact_match"}
    )
    assert "held-out rows of format text" in refusal(scored)


def test_a_file_of_another_kind_turns_no_source_round_in_silence(tmp_path: Path) -> None:
    for name in "bc":
        lines(*[helpers.chat("q", "a")] * 20)(tmp_path / f"{name}.jsonl")
    lines(*[{"instruction": "q", "output": "a"}] * 20)(tmp_path / "a.jsonl")
    found = tiny.read_as(config(tmp_path, f"{tmp_path}/*.jsonl"))
    assert found.data.train[0].format == "messages"
    with pytest.raises(
        UserError, match=r"20 of 60 rows cannot be used, .* field 'messages' is missing"
    ):
        preview.describe(found, helpers.spec())
