"""A column that decides what a row means, and that nothing reads, stops first look, dry run and preparation."""

import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_ray.common.errors import UserError
from olora_ray.config import command_line
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.data import detect
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.evaluation.groups import count_planned
from olora_ray.tokens.prepare import plan_here, prepare
from olora_ray.tokens.preview import describe
from tests import tiny
from tests.said import said
from tests.tokens import helpers

CHATS = [helpers.chat(f"q{n}", f"a{n}") for n in range(30)]
QUESTIONS = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(30)]
TEXTS = [{"text": f"text number {n}"} for n in range(30)]
TOKENS = [{"input_ids": [n + 5, n + 6, n + 7, n + 8]} for n in range(30)]


def with_column(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """The rows with a value of each list, in turn, or the same value in each row."""
    turns = {name: each if isinstance(each, tuple) else (each,) for name, each in values.items()}
    return [
        {**row, **{name: each[n % len(each)] for name, each in turns.items()}}
        for n, row in enumerate(rows)
    ]


def config(folder: Path, rows: list[Any], **source: Any) -> Config:
    path = helpers.write_jsonl(folder / "a.jsonl", rows)
    return helpers.config(folder / "runs", {"path": str(path), **source}, max_length=64)


def refusals(config: Config) -> list[str]:
    """The lines that first look, dry run and preparation end with; "" if they accept the rows."""
    found = []
    for look in (
        detect.check_data,
        lambda given: describe(given, SPEC),
        lambda given: prepare(given, SPEC, "train"),
    ):
        try:
            look(config)
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


SPEC = helpers.spec()
DECIDING = {
    "images": with_column(CHATS, images=(["a.png"], ["b.png"])),
    "rejected": with_column(CHATS, rejected=(True, False)),
    "label": with_column(CHATS, label=(2, 3)),
    "choices": with_column(QUESTIONS, choices=(["a", "b"], ["c", "d"])),
    "pixel_values": with_column(TOKENS, pixel_values=[[0.5, 0.5]]),
    "loss_mask": with_column(TOKENS, loss_mask=[0, 1, 1]),
    "category": with_column(TEXTS, category=("one", "two")),
}


@pytest.mark.parametrize("name", DECIDING)
def test_a_column_that_decides_needs_an_answer(name: str, tmp_path: Path) -> None:
    lines = refusals(config(tmp_path, DECIDING[name]))
    assert all(line.startswith("data.train.0: ") and repr(name) in line for line in lines)
    assert all(f"{name}: none" in line and "\n" not in line for line in lines)
    answered = config(tmp_path, DECIDING[name], fields={name: "none"})
    assert refusals(answered) == [""] * 3
    # A format that is set obeys the same rule.
    known = detect.find_format(answered.data.train[0], "data.train.0", str(tmp_path)).source
    fields = {field: column for field, column in known.fields.items() if column != "none"}
    (tmp_path / "again").mkdir()
    given = config(tmp_path / "again", DECIDING[name], format=known.format, fields=fields)
    assert all(repr(name) in line for line in refusals(given))


LEFT_OUT = {
    "category": with_column(QUESTIONS, category=("weather", "news")),
    "solution": with_column(CHATS, solution=("a", "b")),
    "joined": [{**row, "text": f"### {row['question']} ### {row['answer']}"} for row in QUESTIONS],
    "tokenised": with_column(TEXTS, input_ids=([1, 2], [3]), attention_mask=([1, 1], [1])),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_other_columns_pass(name: str, tmp_path: Path) -> None:
    assert refusals(config(tmp_path, LEFT_OUT[name])) == [""] * 3


@pytest.mark.parametrize(
    ("value", "role"),
    [
        ("be short", "system"),
        ([{"text": "be "}, {"type": "text", "text": "short"}], "system"),
        ("", "user"),
        ([], "user"),
    ],
)
def test_a_system_prompt_beside_messages_is_the_system_message(
    value: Any, role: str, tmp_path: Path
) -> None:
    preview = describe(tiny.read_as(config(tmp_path, with_column(CHATS, system=value))), SPEC)
    text = helpers.decode(preview.examples[0].input_ids)
    assert text.startswith(f"<|im_start|>{role}\n{'be short' if value else 'q'}")


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_the_masks_of_trl_decide_what_is_supervised(name: str, tmp_path: Path) -> None:
    preview = describe(
        tiny.read_as(config(tmp_path, with_column(TOKENS, **{name: [0, 0, 1, 1]}))), SPEC
    )
    assert preview.examples[0].mask.tolist() == [False, False, True, True]
    fields = {name: name}
    lines = refusals(
        config(tmp_path, with_column(TOKENS, **{name: [0, 1]}), format="tokens", fields=fields)
    )
    assert all("wrong_length" in line for line in lines)
    assert (
        f"column {name!r}"
        in refusals(config(tmp_path, with_column(TOKENS, **{name: [0, 1]}), format="tokens"))[0]
    )


def test_packed_rows_are_refused(tmp_path: Path) -> None:
    assert refusals(config(tmp_path, with_column(TOKENS, position_ids=[0, 1, 2, 3]))) == [""] * 3
    packed = refusals(config(tmp_path, with_column(TOKENS, position_ids=[0, 1, 0, 1])))
    assert all("field 'position_ids' starts again" in line for line in packed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_detail", [{"begin_offset": 0, "end_offset": 1, "train": False}]),
        ("images", ["a.png"]),
    ],
)
def test_a_key_of_a_message_that_decides_needs_an_answer(
    key: str, value: Any, tmp_path: Path
) -> None:
    rows = with_key(key, value)
    assert all(f"key {key!r}" in line for line in refusals(config(tmp_path, rows)))
    assert refusals(config(tmp_path, rows, fields={key: "none"})) == [""] * 3


def with_key(key: str, value: Any) -> list[Any]:
    chats = [row["messages"] for row in CHATS]
    return [{"messages": [turns[0], {**turns[1], key: value}]} for turns in chats]


def test_a_key_that_the_template_does_not_read_is_named(tmp_path: Path) -> None:
    rows = with_key("function_name", "f")
    with said() as lines:
        prepare(tiny.read_as(config(tmp_path, rows)), SPEC, "train")
    assert any("key function_name" in line for line in lines)
    reads = helpers.spec(helpers.CHATML.replace("content']", "content'] ~ message.function_name"))
    with said() as lines:
        describe(tiny.read_as(config(tmp_path, rows)), reads)
    assert not any("function_name" in line for line in lines)


@pytest.mark.parametrize("mark", ["train", "weight"])
def test_a_part_of_a_message_that_is_not_trained_rejects_the_row(mark: str, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a", mark: False}, {"type": "text", "text": "b"}]
    rows = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": parts}]} for row in CHATS
    ]
    assert all(
        "'content' has a part that is not to be trained" in line
        for line in refusals(config(tmp_path, rows))
    )


def test_what_the_first_look_did_not_see_stops_the_preparation(tmp_path: Path) -> None:
    rows = [
        {"question": "why", "answer": f"a{n}", **({"rejected": f"t{n}"} if n in (60, 70) else {})}
        for n in range(900)
    ]
    given = config(tmp_path, rows)
    first, dry, run = refusals(given)
    assert first == ""
    assert dry == run
    assert "data.train.0: column 'rejected' (such as \"t" in run
    fields = {"instruction": "question", "output": "answer", "rejected": "none"}
    assert refusals(config(tmp_path, rows, fields=fields)) == [""] * 3


def test_columns_of_parquet_are_looked_at_although_they_are_not_read(tmp_path: Path) -> None:
    rows = with_column(QUESTIONS, rejected=("a", "b"), picked=(1, 2))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = {"path": str(tmp_path / "a.parquet"), "format": "alpaca"}
    fields = {"instruction": "question", "output": "answer"}
    given = helpers.config(tmp_path / "runs", source | {"fields": fields})
    assert "column 'rejected'" in refusals(given)[0]
    answered = helpers.config(tmp_path / "runs", source | {"fields": fields | {"rejected": "none"}})
    assert refusals(answered) == [""] * 3


def test_an_answer_changes_no_store_and_no_group(tmp_path: Path, tiny_spec: TokenizerSpec) -> None:
    rows = with_column(QUESTIONS, topic=("a", "b"))
    fields = {"instruction": "question", "output": "answer"}
    plain = config(tmp_path, rows, format="alpaca", fields=fields)
    answered = config(tmp_path, rows, format="alpaca", fields=fields | {"topic": "none"})
    plans = [plan_here(each, tiny_spec, "train") for each in (plain, answered)]
    assert plans[0].digest() == plans[1].digest()
    assert count_planned("topic", plans[1], 9) == 2
    # What the gate reads needs no other answer.
    grouped = override(config(tmp_path, rows), {"gate.group": "topic"})
    assert refusals(grouped) == [""] * 3
    assert count_planned("topic", plan_here(tiny.read_as(grouped), tiny_spec, "train"), 9) == 2


@pytest.mark.parametrize(
    "name", ["Label ", "a\tlabel\n  c", "label's: {a}", "Label: Ü", "= label", "Ja, label"]
)
def test_the_printed_setting_works_for_any_name(name: str, tmp_path: Path) -> None:
    rows = with_column(TEXTS, **{name: ("one", "two")})
    line = refusals(config(tmp_path, rows))[0]
    assert "\n" not in line
    setting = shlex.split(line.rpartition("if not, ")[2])[0]
    changes = command_line.parse(["x.yaml", setting], usage="", options=[]).changes()
    assert refusals(override(config(tmp_path, rows), changes)) == [""] * 3
