"""Chats and cells as other tools write them: what is read from a file whose source sets only its path."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_ray.common.errors import UserError
from olora_ray.data.formats import to_example
from olora_ray.data.formats.format import Chat, Rejected
from olora_ray.tokens.preview import describe
from tests import tiny
from tests.data import reading
from tests.tokens import helpers

Q = 'What\'s "new",\nplease?'
A = "It's {a} {b}."
QA = [("user", Q), ("assistant", A)]
SYSTEM = ("system", "Be kind.")
CALL = {"name": "f", "arguments": {"x": 1}}
TURNS = helpers.chat(Q, A)["messages"]


def examples(file: Path) -> Iterator[Any]:
    """The example of each row, with format and fields as detected; a reason in place of a rejected one."""
    config = helpers.config(file.parent / "runs", str(file))
    [source] = tiny.read_as(config).data.train
    for listed in reading.listed(file):
        for row in reading.rows(listed):
            try:
                yield to_example(source.format, row, source.fields, as_chat=True)
            except Rejected as why:
                yield why.reason


def said(example: Any) -> list[tuple[str, str]]:
    assert isinstance(example, Chat), example
    return [(message["role"], message["content"]) for message in example.messages]


def turn(role: str, content: Any, of: str = "role", value: str = "content") -> dict[str, Any]:
    return {of: role, value: content}


def langchain(role: str, content: str) -> dict[str, Any]:
    return turn(role, {"content": content, "example": False}, "type", "data")


def gemini(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [turn("User", Q), turn("ASSISTANT", A)]}, QA),
        (
            {"messages": [turn("System", "Be kind."), turn("User", Q), turn("Chatbot", A)]},
            [SYSTEM, *QA],
        ),
        ({"messages": [turn("prompter", Q, value="text"), turn("assistant", A, value="text")]}, QA),
        (
            {"conversations": [turn("user", Q, "from", "value"), turn("bing", A, "from", "value")]},
            QA,
        ),
        ({"messages": [turn("human", Q, "type"), turn("ai", A, "type")]}, QA),
        (
            {"messages": [langchain(*SYSTEM), langchain("human", Q), langchain("ai", A)]},
            [SYSTEM, *QA],
        ),
        (
            {
                "systemInstruction": gemini(*SYSTEM),
                "contents": [gemini("user", Q), gemini("model", A)],
            },
            [SYSTEM, *QA],
        ),
        ({"conversations": [Q, A], "source": "x"}, QA),
        ({"id": "7", "data": [Q, A, Q, A]}, QA * 2),
        ({"conversation": [{"input": Q, "output": A}, {"input": Q, "output": A}]}, QA * 2),
        ({"dialogue": [[Q, A]], "system": "Be kind."}, [SYSTEM, *QA]),
        ({"messages": [turn("assistant", "Hello"), *TURNS]}, [("assistant", "Hello"), *QA]),
        ({"messages": [*TURNS, turn(*SYSTEM), *TURNS]}, [*QA, SYSTEM, *QA]),
    ],
)
def test_a_chat_of_another_tool(
    row: Mapping[str, Any], expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(row)}\n" * 4)
    assert [said(example) for example in examples(file)] == [expected] * 4


@pytest.mark.parametrize(
    ("form", "call"),
    [
        ("type", {"tool_calls": [{"name": "f", "args": {"x": 1}, "id": "1", "type": "tool_call"}]}),
        ("role", {"function_call": CALL}),
    ],
)
def test_a_call_of_langchain_and_of_the_first_api_of_openai(
    form: str, call: dict[str, Any], tmp_path: Path
) -> None:
    human, ai, tool = (
        ("human", "ai", "tool") if form == "type" else ("user", "assistant", "function")
    )
    turns = [
        turn(human, Q, form),
        {**turn(ai, "", form), **call},
        turn(tool, "1", form),
        turn(ai, A, form),
    ]
    row = {"messages": turns, "functions": [{"name": "f", "parameters": {}}]}
    if form == "type":
        del row["functions"]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row))
    [example] = examples(file)
    assert [role for role, _ in said(example)] == ["user", "assistant", "tool", "assistant"]
    [made] = example.messages[1]["tool_calls"]
    assert (made["type"], made["function"]) == ("function", CALL)
    if form == "role":
        assert example.tools == ({"type": "function", "function": row["functions"][0]},)


def test_what_the_assistant_says_before_any_question_is_context() -> None:
    system, greeting = turn("system", "s"), turn("assistant", "Hello")
    for head in ([greeting], [system, greeting]):
        example = to_example("messages", {"messages": [*head, *TURNS]}, {})
        assert isinstance(example, Chat)
        marks = [message.get("weight", 1) for message in example.messages]
        assert marks == [*[1] * (len(head) - 1), 0, 1, 1]


@pytest.mark.parametrize("cells", ["lists", "arrays", "short arrays"])
def test_messages_that_pandas_has_written_into_csv(cells: str, tmp_path: Path) -> None:
    turns = TURNS if "short" not in cells else helpers.chat("q", "{a} {b}")["messages"]
    value = np.array(turns, dtype=object) if "arrays" in cells else turns
    pd.DataFrame({"messages": [value] * 3}).to_csv(tmp_path / "a.csv", index=False)
    expected = [(each["role"], each["content"]) for each in turns]
    assert [said(example) for example in examples(tmp_path / "a.csv")] == [expected] * 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_a_first_line_that_names_the_delimiter(
    delimiter: str, encoding: str, tmp_path: Path
) -> None:
    lines = [f"sep={delimiter}", delimiter.join(["question", "answer"])]
    lines += [delimiter.join([f"größer | {n}?", f"ja {n}"]) for n in range(20)]
    (tmp_path / "a.csv").write_bytes("\r\n".join([*lines, ""]).encode(encoding))
    read = [said(example) for example in examples(tmp_path / "a.csv")]
    assert read == [[("user", f"größer | {n}?"), ("assistant", f"ja {n}")] for n in range(20)]


@pytest.mark.parametrize("null", ["nan", "NaN", "NULL", "None", "<NA>"])
def test_a_cell_without_a_value_is_empty(null: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        f"instruction,input,output\nq,{null},a\nq,a {null},a\nq,,{null}\n"
    )
    whole, part, answer = examples(tmp_path / "a.csv")
    assert said(whole) == [("user", "q"), ("assistant", "a")]
    assert said(part)[0] == ("user", f"q\n\na {null}")
    assert answer == "empty_answer"


def test_a_number_that_is_none_is_no_value(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "input": value, "output": "a"} for value in ("more", float("nan"))]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.json"):
        more, none = examples(tmp_path / name)
        assert said(more)[0] == ("user", "q\n\nmore")
        assert said(none)[0] == ("user", "q")


def test_texts_that_are_stored_as_binary(tmp_path: Path) -> None:
    turns = [{key: text.encode() for key, text in each.items()} for each in TURNS]
    table = pa.table({"messages": [turns], "system": ["ß".encode()], "score": [float("nan")]})
    parquet.write_table(table, tmp_path / "a.parquet")
    [example] = examples(tmp_path / "a.parquet")
    assert said(example) == [("system", "ß"), *QA]


def test_an_unknown_role_is_named_though_other_formats_have_the_column(tmp_path: Path) -> None:
    turns = [turn("Kunde", Q, "from", "value"), turn("Agent", A, "from", "value")]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}]))
    with pytest.raises(UserError) as refused:
        next(examples(tmp_path / "a.json"))
    assert "unknown role 'Kunde'" in str(refused.value)
    assert "format: sharegpt" not in str(refused.value)


@pytest.mark.parametrize(
    "row", [{"text": ""}, {"text": None}, {"conversations": []}], ids=["text", "null", "chat"]
)
def test_rows_that_hold_nothing_do_not_count_as_broken(row: dict[str, Any], tmp_path: Path) -> None:
    full: dict[str, Any] = {"text": "Some words."}
    if "conversations" in row:
        full = {
            "conversations": [turn("human", Q, "from", "value"), turn("gpt", A, "from", "value")]
        }
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f"{json.dumps(row if n % 3 else full)}\n" for n in range(60)))
    preview = describe(helpers.config(tmp_path / "runs", str(file)), helpers.spec())
    assert (preview.read, sum(preview.rejected.values()), preview.packs > 0) == (60, 40, True)
