"""docs/generated/configuration.md and the schemas for editors are what the schema says."""

import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from olora_ray.config import command_line
from olora_ray.config.load import parse_yaml
from tools import write_configuration


def test_the_page_is_current() -> None:
    current = write_configuration.PAGE.read_text(encoding="utf-8") == write_configuration.page()
    assert current, "docs/generated/configuration.md is stale: make docs"


def test_the_introductions_commands_set_fields_that_there_are(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "run: {name: a}\nmodel: {name: m}\ndata: {train: [{path: b.jsonl}], eval: [{path: e.jsonl}]}\n"
    )
    commands = [line for line in write_configuration.INTRO.splitlines() if " my_run.yaml " in line]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command.partition(" my_run.yaml ")[2])
        command_line.read_arguments([str(file), *words], "usage")


@pytest.mark.parametrize("kind", ["config", "space"])
def test_the_schemas_for_editors_are_current(kind: str) -> None:
    file = write_configuration.schema_file(kind)
    assert file.read_text(encoding="utf-8") == write_configuration.schema(kind), (
        f"{file.name} is stale: make docs"
    )


def mistakes(kind: str, tree: Any) -> list[str]:
    """The places in a file that an editor would mark."""
    schema = json.loads(write_configuration.schema_file(kind).read_text(encoding="utf-8"))
    found = jsonschema.Draft202012Validator(schema).iter_errors(tree)
    return sorted(".".join(map(str, error.absolute_path)) for error in found)


@pytest.mark.parametrize("kind", ["config", "space"])
def test_an_editor_finds_nothing_wrong_with_the_files_that_there_are(kind: str) -> None:
    patterns = {
        "config": (
            "pipelines/configs/*.yaml",
            "pipelines/recipes/*/config.yaml",
            "pipelines/contrib/**/*.yaml",
        ),
        "space": ("tune_spaces/*.yaml",),
    }
    files = [file for pattern in patterns[kind] for file in command_line.ROOT.glob(pattern)]
    assert len(files) > 4
    for file in files:
        assert mistakes(kind, parse_yaml(file.read_text(encoding="utf-8"), str(file))) == [], file


def test_an_editor_takes_the_short_forms_and_finds_mistakes() -> None:
    required: dict[str, Any] = {"run": {"name": "a"}, "model": {"name": "m"}}
    short = {
        "data": {"train": "a.jsonl", "eval": ["b.jsonl", {"path": "c.jsonl"}]},
        "adapter": {"targets": "q_proj"},
    }
    assert (
        mistakes("config", required | short | {"compare": {"test_rows": 9}, "gate": {"and": []}})
        == []
    )
    wrong = {
        "data": {"train": [{"path": 1}]},
        "adapter": {"rank": 0},
        "cluster": {"workers": [1, 2, 3]},
        "trian": {},
    }
    assert mistakes("config", required | wrong) == [
        "",
        "adapter.rank",
        "cluster.workers",
        "data.train",
    ]
    assert mistakes("space", {"search": {"train.lr": {"logunifrom": [1, 2]}}}) == [
        "search.train.lr"
    ]
