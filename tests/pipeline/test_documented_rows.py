"""A row that docs/data.md describes passes the first look and the dry run, and nothing of it is left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from olora_ray.data import detect
from olora_ray.data.formats import format_named, own_formats
from olora_ray.tokens.preview import describe
from tests.said import said
from tests.tokens import helpers

CHAT = helpers.chat("two and two?", "four")["messages"]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
IDS = [ord(letter) - 4 for letter in "two and two? four"]
VALUES: dict[str, list[Any]] = {
    "messages": [CHAT, json.dumps(CHAT)],
    "conversations": [
        [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four"}]
    ],
    "turns": [["two and two?", "four"], [["two and two?", "four"]]],
    "prompt": ["two and two?", CHAT[:1], json.dumps(CHAT[:1])],
    "completion": ["four", CHAT[1:], json.dumps(CHAT[1:])],
    "chosen": [CHAT],
    "rejected": [[*CHAT[:1], {"role": "assistant", "content": "five"}]],
    "tools": [[TOOL], json.dumps([TOOL])],
    "instruction": ["add"],
    "output": ["four"],
    "input": ["two and two"],
    "history": [[["one and one?", "two"]]],
    "system": ["be short"],
    "text": ["two and two is four"],
    "input_ids": [IDS],
    "labels": [[-100] * 13 + IDS[13:]],
    "attention_mask": [[1] * len(IDS)],
    "completion_mask": [[0] * 13 + [1] * 4],
    "assistant_masks": [[0] * 13 + [1] * 4],
    "position_ids": [[*range(len(IDS))]],
}
"""What each field may hold; the first of one field goes with the first of the others. Other fields hold a text."""
# A rating needs one of two other fields: tests/data/test_preference.py.
FORMATS = [format.name for format in own_formats() if format.makes != "rating"]


def rows(format: str) -> list[dict[str, Any]]:
    """Each way to write the fields that are needed, alone and with each way to write each of the others."""
    known = format_named(format)
    values = {name: VALUES.get(name, ["four"]) for name in known.names}
    count = max(len(values[name]) for name in known.needed)
    needed = [{name: values[name][way] for name in known.needed} for way in range(count)]
    others = [
        {field.name: value}
        for field in known.fields
        if not field.needed and not field.in_turn
        for value in values[field.name]
    ]
    return [{**row, **more} for row in needed for more in ({}, *others)]


EACH = pytest.mark.parametrize(
    "row", [pytest.param((f, row), id=f"{f}-{n}") for f in FORMATS for n, row in enumerate(rows(f))]
)


@EACH
@pytest.mark.parametrize("renamed", [False, True])
def test_a_documented_row_is_used_as_it_is(
    row: tuple[str, dict[str, Any]], renamed: bool, tmp_path: Path
) -> None:
    format, columns = row
    fields = {
        name: f"my {name}" if renamed else name
        for name in columns
        if renamed or name in format_named(format).asked
    }
    path = helpers.write_jsonl(
        tmp_path / "a.jsonl", [{fields.get(name, name): columns[name] for name in columns}]
    )
    source = {"path": str(path), "format": format, "fields": fields}
    config = helpers.config(tmp_path / "runs", source, max_length=512)
    detect.check_data(config)
    spec = helpers.spec(
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + helpers.CHATML
    )
    with said() as lines:
        preview = describe(config, spec)
    assert (preview.rows, preview.rejected) == (1, {})
    assert not [line for line in lines if "the format" in line]
    text = helpers.decode(preview.examples[0].input_ids)
    assert "four" in text
    assert ("add" in text) == bool({"tools", "instruction"} & set(columns))
