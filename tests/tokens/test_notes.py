"""Unusual rows are counted, and reported once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.manifest import lines
from olora_ray.tokens.prepare import prepare
from olora_ray.tokens.preview import describe
from tests.data.test_chat_template import ALL, conversation
from tests.said import said
from tests.tokens import helpers


def write(folder: Path, *chats: list[str]) -> Path:
    return helpers.write_jsonl(folder / "a.jsonl", [{"messages": conversation(*turns)} for turns in chats])


LONG = [f"turn {number}" for number in range(10)]
SPLIT = (
    "2 of 3 chats were split by the chat template, one example per answer, into 3.2 times the tokens; to"
    " train only the last answer of a chat, set data.last_turn_only: true"
)


def test_chats_that_a_template_splits(tmp_path: Path) -> None:
    # Qwen3 drops the reasoning of earlier turns, so 5 answers become 5 examples with the whole chat before each.
    spec = helpers.spec(ALL["qwen3"])
    path = write(tmp_path, LONG, LONG, ["hi", "one"])
    config = helpers.config(tmp_path / "runs", path, max_length=1000)
    for when in ("", " (built earlier)"):
        with said() as printed:
            store = prepare(config, spec, "train")
        assert [line for line in printed if "split" in line] == [f"tokens: train: {SPLIT}"]
        assert any(line.endswith(when) for line in printed)
    assert store.manifest.examples == 11
    with said() as printed:
        describe(config, spec)
    assert f"of the rows read, {SPLIT}" in printed


def test_with_the_last_turn_only_nothing_is_split(tmp_path: Path) -> None:
    spec = helpers.spec(ALL["qwen3"])
    path = write(tmp_path, LONG, LONG, ["hi", "one"])
    with said() as printed:
        store = prepare(helpers.config(tmp_path / "runs", path, max_length=1000, last_turn_only=True), spec, "train")
    assert store.manifest.examples == 3
    assert not [line for line in printed if "split" in line]
    whole = prepare(helpers.config(tmp_path / "runs", path, max_length=1000), spec, "train")
    assert whole.digest != store.digest


@pytest.mark.parametrize(
    ("end", "answer", "expected"),
    [("", "x", ["single", "unended"]), ("", "xy", ["unended"]), ("{{ eos_token }}", "x", [])],
)
def test_single_tokens_and_answers_without_an_end(end: str, answer: str, expected: list[str], tmp_path: Path) -> None:
    template = f"{{% for m in messages %}}{{{{ m.content }}}}{end}\n{{% endfor %}}"
    path = write(tmp_path, ["hi", answer])
    spec = helpers.spec(template)
    inner = json.loads(spec.json)
    if not end:  # the end token is put after an answer without one, unless the tokenizer does not know it in a text
        inner["added_tokens"] = [token for token in inner["added_tokens"] if token["content"] != "</s>"]
    spec = replace(spec, json=json.dumps(inner))
    store = prepare(helpers.config(tmp_path / "runs", path), spec, "train")
    found = store.manifest.notes
    assert found == {"chats": 1, **dict.fromkeys(expected, 1)}
    words = {"single": "rows with a single supervised token: 1", "unended": "does not end with an end token: 1"}
    assert [words[name] in line for name, line in zip(expected, lines(found), strict=True)] == [True] * len(expected)


def test_ordinary_rows_are_not_worth_a_line(tmp_path: Path, tiny_spec: TokenizerSpec) -> None:
    rows: list[Any] = [helpers.chat("q", "a"), helpers.chat("q", "abc")]
    store = prepare(
        helpers.config(tmp_path / "runs", helpers.write_jsonl(tmp_path / "a.jsonl", rows)), tiny_spec, "train"
    )
    assert store.manifest.notes == {"chats": 2}
    texts = helpers.write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "abcdefgh"}])
    source = {"path": str(texts), "format": "text"}
    assert prepare(helpers.config(tmp_path / "runs", source, max_length=8), tiny_spec, "train").manifest.notes == {}
    assert lines({"chats": 2}) == lines({}) == []


def test_columns_and_keys_that_nothing_reads_are_counted_and_said(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "q", "name": "Ann", "thinking": "t", "\ud800\n": 1},
        {"role": "assistant", "content": "a", "name": "Bob", "function_call": {}, "train": True},
    ]
    rows = [{"messages": turns, "id": 1}, {"messages": turns, "id": None, "source": "x"}]
    spec = helpers.spec(helpers.CHATML + "{% set seen = messages[0].name, messages[0].reasoning_content %}")
    config = helpers.config(tmp_path / "runs", helpers.write_jsonl(tmp_path / "a.jsonl", rows))
    expected = [
        "columns that the format does not read: id (2), source (1)",
        "keys of messages that neither the format nor the chat template reads: \\ud800 (2), function_call (2)",
    ]
    with said() as printed:
        prepare(config, spec, "train")
    assert [line for line in printed if "the format" in line] == [f"tokens: train: {line}" for line in expected]
    with said() as printed:
        describe(config, spec)
    assert [f"of the rows read, {line}" for line in expected] == printed[-2:]


def test_columns_of_parquet_that_are_not_read_are_said_too(tmp_path: Path, tiny_spec: TokenizerSpec) -> None:
    parquet.write_table(pa.Table.from_pylist([{**helpers.chat("q", "a"), "id": 1}] * 3), tmp_path / "a.parquet")
    notes = prepare(helpers.config(tmp_path / "runs", tmp_path / "a.parquet"), tiny_spec, "train").manifest.notes
    assert lines(notes) == ["columns that the format does not read: id (3)"]


def test_names_that_nothing_reads_are_bounded(tmp_path: Path, tiny_spec: TokenizerSpec) -> None:
    rows = [{**helpers.chat("q", "a"), str(number) * 200: 1} for number in range(300)]
    config = helpers.config(tmp_path / "runs", helpers.write_jsonl(tmp_path / "a.jsonl", rows))
    notes = prepare(config, tiny_spec, "train").manifest.notes
    [line] = lines(notes)
    assert len(line) < 1000
    assert len(notes) < 110
