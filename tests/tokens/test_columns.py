"""A column that nothing reads, and that may decide what a row means, stops first look, dry run and preparation."""

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
# The table of what was dropped in silence, and what must stay refused; the other columns of a row are read.
DROPPED = {
    "images": with_column(CHATS, images=(["a.png"], ["b.png"])),
    "rejected": with_column(CHATS, rejected=("b", "c")),
    "label": with_column(CHATS, label=(True, False)),
    "choices": with_column(QUESTIONS, choices=(["a", "b"], ["c", "d"])),
    "text": with_column(QUESTIONS, text=("a", "b")),
    "pixel_values": with_column(TOKENS, pixel_values=[[0.5, 0.5]]),
    "loss_mask": with_column(TOKENS, loss_mask=[0, 1, 1]),
    **{
        name: with_column(TEXTS, **{name: ("one", "two")})
        for name in ("category", "class", "prompt", "sql")
    },
    "source": with_column(QUESTIONS, source=("The dog is old.", "It rains today.")),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_column_that_may_decide_what_a_row_means_needs_an_answer(
    name: str, tmp_path: Path
) -> None:
    given = config(tmp_path, DROPPED[name])
    lines = refusals(given)
    assert len({*lines}) == 1
    assert f"column {name!r} (such as " in lines[0]
    assert "\n" not in lines[0]
    # A format that is set obeys the same rule, and the answer that the line prints works for both.
    known = detect.find_format(
        given.data.train[0].model_copy(update={"fields": {name: "none"}}),
        "data.train.0",
        str(tmp_path),
    )[0]
    assert f"{name}: none}}'" in lines[0]
    assert (
        refusals(config(tmp_path, DROPPED[name], format=known.format, fields=known.fields))
        == [""] * 3
    )
    mapped = {field: column for field, column in known.fields.items() if column != "none"}
    (tmp_path / "again").mkdir()
    lines = refusals(config(tmp_path / "again", DROPPED[name], format=known.format, fields=mapped))
    assert [f"column {name!r} (such as " in line for line in lines] == [True] * 3


PASSING = {
    "about the row": with_column(
        CHATS, id=("x", "y"), source=("a", "b"), created_at=("May", "June"), lang=("de", "en")
    ),
    "one value": with_column(
        QUESTIONS, category="general knowledge", empty="", nothing=[], null=None
    ),
    "repeated": [
        {**row, "prompt": row["messages"][0]["content"], "id": n} for n, row in enumerate(CHATS)
    ],
    "joined": [{**row, "text": f"### {row['question']} ### {row['answer']}"} for row in QUESTIONS],
    "tokenised": with_column(TEXTS, input_ids=([1, 2], [3]), attention_mask=([1, 1], [1])),
}


@pytest.mark.parametrize("name", PASSING)
def test_other_columns_pass(name: str, tmp_path: Path) -> None:
    assert refusals(config(tmp_path, PASSING[name])) == [""] * 3


def test_a_text_beside_a_class_is_read_as_the_line_says(tmp_path: Path) -> None:
    line = refusals(config(tmp_path, DROPPED["sql"]))[0]
    answer = "train it as the answer with 'data.train.0.fields={instruction: text, output: sql}', or leave it out with"
    assert f"{answer} 'data.train.0.fields={{sql: none}}'" in line
    known = tiny.read_as(
        config(tmp_path, DROPPED["sql"], fields={"instruction": "text", "output": "sql"})
    )
    assert known.data.train[0].format == "alpaca"


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


MARKED = {
    "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}],
    "images": ["a.png"],
    "function_call": {"name": "f", "arguments": "{}"},
}


@pytest.mark.parametrize("key", MARKED)
def test_a_key_of_a_message_that_nothing_reads_needs_an_answer(key: str, tmp_path: Path) -> None:
    rows = [
        {"messages": [turns[0], {**turns[1], key: MARKED[key]}]}
        for turns in (row["messages"] for row in CHATS)
    ]
    lines = refusals(config(tmp_path, rows))
    # Without the template the first look does not know which keys it reads.
    assert all(f"key {key!r} (such as " in line for line in lines[key == "function_call" :])
    assert refusals(config(tmp_path, rows, fields={key: "none"})) == [""] * 3
    if key == "function_call":
        reads = helpers.spec(
            helpers.CHATML.replace("content']", "content'] ~ (message.function_call or '')")
        )
        assert describe(tiny.read_as(config(tmp_path, rows)), reads).rows == 30


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
        {"question": "why", "answer": f"a{n}", **({"topic": f"t{n}"} if n in (60, 70) else {})}
        for n in range(900)
    ]
    given = config(tmp_path, rows)
    first, dry, run = refusals(given)
    assert first == ""
    assert dry == run
    assert "data.train.0: alpaca rows do not use column 'topic' (such as \"t" in run
    fields = {"instruction": "question", "output": "answer", "topic": "none"}
    assert refusals(config(tmp_path, rows, fields=fields)) == [""] * 3


def test_columns_of_parquet_are_looked_at_although_they_are_not_read(tmp_path: Path) -> None:
    rows = with_column(QUESTIONS, topic=("a", "b"), picked=(1, 2))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = {"path": str(tmp_path / "a.parquet"), "format": "alpaca"}
    fields = {"instruction": "question", "output": "answer"}
    given = helpers.config(tmp_path / "runs", source | {"fields": fields})
    assert "column 'topic'" in refusals(given)[0]
    answered = helpers.config(tmp_path / "runs", source | {"fields": fields | {"topic": "none"}})
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
    "name", ["Kategorie ", "a\tb\n  c", "it's: {a}", "yes", "Über", "=", "Ja, nein"]
)
def test_the_printed_setting_works_for_any_name(name: str, tmp_path: Path) -> None:
    rows = with_column(TEXTS, **{name: ("one", "two")})
    line = refusals(config(tmp_path, rows))[0]
    assert "\n" not in line
    setting = shlex.split(line.rpartition("leave it out with ")[2])[0]
    changes = command_line.parse(["x.yaml", setting], usage="", options=[]).changes()
    assert refusals(override(config(tmp_path, rows), changes)) == [""] * 3
