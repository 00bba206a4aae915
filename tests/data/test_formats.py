import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from pyarrow import parquet

from olora_ray.common.errors import UserError
from olora_ray.data.formats import Chat, Completion, Rejected, Text, check_fields, to_example
from tests.tokens.helpers import chat


def roles(example: Any) -> list[tuple[str, str]]:
    assert isinstance(example, Chat)
    return [(message["role"], message["content"]) for message in example.messages]


def test_messages() -> None:
    assert roles(to_example("messages", chat("q", "a"), {})) == [("user", "q"), ("assistant", "a")]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a", "name": None},
    ]
    example = to_example("messages", {"chat": parts}, {"messages": "chat"})
    assert roles(example) == [("user", "q"), ("assistant", "a")]
    assert isinstance(example, Chat)
    assert "name" not in example.messages[1]


def test_messages_and_tools_as_json_text() -> None:
    row = {
        "messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]',
        "tools": '[{"type": "f"}]',
    }
    example = to_example("messages", row, {})
    assert roles(example) == [("user", "q"), ("assistant", "a")]
    assert isinstance(example, Chat)
    assert example.tools == ({"type": "f"},)


def test_a_tool_call_is_an_answer() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    example = to_example("messages", {"messages": turns}, {})
    assert isinstance(example, Chat)
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize("none", [[], "", "[]", None])
def test_no_tool_calls_are_no_key(none: Any) -> None:
    """Servers answer with `"tool_calls": []`; Llama 3.1's template refuses each message with the key but one call."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": none}]
    example = to_example("messages", {"messages": turns}, {})
    assert isinstance(example, Chat)
    assert example.messages[1] == {"role": "assistant", "content": "a"}


def test_prompt_completion() -> None:
    fields = {"prompt": "question", "completion": "answer"}
    assert to_example("prompt_completion", {"question": "q", "answer": "a"}, fields) == Completion("q", "a")


def test_prompt_completion_as_a_chat() -> None:
    fields = {"prompt": "question", "completion": "answer"}
    row = {"question": "q ", "answer": "a", "tools": [{"type": "f"}]}
    example = to_example("prompt_completion", row, fields, as_chat=True)
    assert roles(example) == [("user", "q "), ("assistant", "a")]
    assert isinstance(example, Chat)
    assert example.tools == ({"type": "f"},)
    messages = chat("q", "a")["messages"]
    lists = {"prompt": messages[:1], "completion": messages[1:]}
    assert roles(to_example("prompt_completion", lists, {}, as_chat=True)) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(Rejected, match="lists of messages: a chat, which needs chat: true"):
        to_example("prompt_completion", lists, {})
    with pytest.raises(Rejected, match="'tools': a text without chat template has no place for it"):
        to_example("prompt_completion", row, fields)
    assert to_example("prompt_completion", {**row, "tools": "[]"}, fields) == Completion("q ", "a")


def test_answers_in_a_prompt_of_messages_are_given_and_one_of_the_completion_is_needed() -> None:
    turns = [*chat("2 + 2", "4")["messages"], *chat("3 + 3", "6")["messages"]]
    lists = {"prompt": turns[:3], "completion": turns[3:]}
    in_cells = {name: json.dumps(value) for name, value in lists.items()}  # as csv has them
    for row in (lists, in_cells):
        example = to_example("prompt_completion", row, {}, as_chat=True)
        assert isinstance(example, Chat)
        assert [message.get("weight", 1) for message in example.messages if message["role"] == "assistant"] == [0, 1]
    for none in ([], turns[2:3]):
        with pytest.raises(Rejected, match="no_answer: field 'completion' has no message of the assistant"):
            to_example("prompt_completion", {"prompt": turns[:2], "completion": none}, {}, as_chat=True)
    for text in ("[1, 2]", "[{]", '[{"role": "user"}]', "[]"):
        example = to_example("prompt_completion", {"prompt": text, "completion": "x"}, {}, as_chat=True)
        assert roles(example) == [("user", text), ("assistant", "x")]


def test_an_answer_in_a_cell_may_be_a_call_alone() -> None:
    """Its message has no content: it was trained as JSON text."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    cells = {
        "prompt": json.dumps([{"role": "user", "content": "q"}]),
        "completion": json.dumps([{"role": "assistant", "tool_calls": [call]}]),
    }
    example = to_example("prompt_completion", cells, {}, as_chat=True)
    assert isinstance(example, Chat)
    assert example.messages[1]["tool_calls"] == [call]


def test_turns_as_a_sequence_of_datasets_are_stored(tmp_path: Path) -> None:
    """An object of lists, in place of a list of objects."""
    turns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    text = datasets.Value("string")
    features = datasets.Features({"messages": datasets.Sequence({"role": text, "content": text})})
    datasets.Dataset.from_list([{"messages": turns}], features=features).to_parquet(tmp_path / "a.parquet")
    [row] = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert row == {"messages": turns}
    assert roles(to_example("messages", row, {})) == [("user", "q"), ("assistant", "a")]
    said = {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}
    assert roles(to_example("sharegpt", said, {})) == [("user", "q"), ("assistant", "a")]
    parts = {name: {key: [value] for key, value in zip(turns, each, strict=True)} for name, each in PARTS.items()}
    assert roles(to_example("prompt_completion", parts, {}, as_chat=True)) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(Rejected, match="'messages' is an object, not a list"):
        to_example("messages", {"messages": {"role": ["user", "assistant"], "content": ["q"]}}, {})


PARTS = {"prompt": ("user", "q"), "completion": ("assistant", "a")}


def test_alpaca() -> None:
    row = {"instruction": "Sum up.", "input": "A text.", "output": "Short."}
    assert roles(to_example("alpaca", row, {})) == [("user", "Sum up.\n\nA text."), ("assistant", "Short.")]
    assert roles(to_example("alpaca", {**row, "input": ""}, {}))[0] == ("user", "Sum up.")
    assert roles(to_example("alpaca", {**row, "system": "Be kind."}, {}))[0] == ("system", "Be kind.")


@pytest.mark.parametrize("history", [[["q1", "a1"], ["q2", "a2"]], '[["q1", "a1"], ["q2", "a2"]]'])
def test_the_history_of_alpaca_is_earlier_turns(history: Any) -> None:
    row = {"instruction": "q3", "output": "a3", "system": "s", "history": history}
    expected = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"), ("user", "q3")]
    assert roles(to_example("alpaca", row, {})) == [("system", "s"), *expected, ("assistant", "a3")]
    for nothing in ([], None, ""):
        assert len(roles(to_example("alpaca", {**row, "history": nothing}, {}))) == 3


def test_sharegpt() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert roles(to_example("sharegpt", {"conversations": turns}, {})) == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
    ]
    renamed = [{"role": "user", "text": "q"}, {"role": "model", "text": "a"}]
    fields = {"conversations": "turns", "from": "role", "value": "text"}
    assert roles(to_example("sharegpt", {"turns": renamed}, fields)) == [("user", "q"), ("assistant", "a")]


TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]


def test_columns_of_sharegpt() -> None:
    row = {"conversations": TURNS, "system": "s", "tools": '[{"name": "f"}]'}
    example = to_example("sharegpt", row, {})
    assert roles(example) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert isinstance(example, Chat)
    assert example.tools == ({"name": "f"},)
    assert example.messages[-1] == {"role": "assistant", "content": "a", "weight": 0}
    for empty in ({"system": ""}, {"system": None, "tools": "[]"}, {}):
        assert to_example("sharegpt", {"conversations": TURNS, **empty}, {}) == Chat(example.messages[1:])
    other = {"conversations": TURNS, "system": 3}
    assert to_example("sharegpt", other, {"system": "none"}) == Chat(example.messages[1:])
    twice = [{"from": "system", "value": "s"}, *TURNS]
    assert to_example("sharegpt", {**row, "conversations": twice}, {}) == example
    with pytest.raises(Rejected, match="field 'system' and the first message are two different system messages"):
        to_example("sharegpt", {**row, "conversations": twice, "system": "other"}, {})


def test_tool_calls_of_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "X"}}'},
        {"from": "observation", "value": "yes"},
        {"from": "gpt", "value": "It rains."},
    ]
    example = to_example("sharegpt", {"conversations": turns}, {})
    assert isinstance(example, Chat)
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "X"}}}
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    for broken in ("weather(X)", "[]", '{"arguments": {}}', None):
        with pytest.raises(Rejected, match="message 2: the value of a function_call is not JSON text"):
            to_example("sharegpt", {"conversations": [turns[0], {"from": "function_call", "value": broken}]}, {})


def test_nulls_inside_of_objects_are_missing_keys_but_for_those_in_json_text() -> None:
    tools = [{"name": "f", "parameters": {"x": {"type": "text", "expr": None}, "y": None}, "enum": [None, {"z": None}]}]
    calls = [{"function": {"name": "f", "arguments": {"x": 1, "y": None}}}]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    example = to_example("messages", {"messages": [USER, answer], "tools": tools}, {})
    assert isinstance(example, Chat)
    assert example.tools == ({"name": "f", "parameters": {"x": {"type": "text"}}, "enum": [None, {}]},)
    assert example.messages[1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"x": 1}}}]
    as_text = {"role": "assistant", "content": None, "tool_calls": json.dumps(calls)}
    example = to_example("messages", {"messages": [USER, as_text], "tools": json.dumps(tools)}, {})
    assert isinstance(example, Chat)
    assert example.tools == tuple(tools)
    assert example.messages[1]["tool_calls"] == calls


def test_text() -> None:
    assert to_example("text", {"body": "abc"}, {"text": "body"}) == Text("abc")


DEEP = "[" * 100_000
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("format", "row", "reason", "message"),
    [
        ("messages", [1], "not_an_object", "expected an object with fields, found a list"),
        ("messages", {"text": "x", "id": 1}, "missing_field", "field 'messages' is not there; the row has text, id"),
        ("messages", {"messages": None}, "missing_field", "field 'messages' is null"),
        ("messages", {"messages": 3}, "wrong_type", "field 'messages' is a number, not a list"),
        ("messages", {"messages": "hello"}, "wrong_type", "field 'messages' is text, not a list of messages"),
        ("messages", {"messages": ["x"]}, "wrong_type", "message 1 is text, not an object"),
        ("messages", {"messages": [{"content": "x"}]}, "missing_field", "message 1 has no 'role'; it has content"),
        (
            "messages",
            {"messages": [{"role": "bot", "content": "x"}]},
            "bad_role",
            "unknown role 'bot'; known: assistant",
        ),
        ("messages", {"messages": [USER, {"role": "assistant", "content": " "}]}, "empty_answer", "message 2"),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": {}}]},
            "wrong_type",
            "'content' is an object",
        ),
        ("messages", {"messages": [{"role": "user"}, ANSWER]}, "missing_field", "message 1 has no 'content'"),
        ("messages", {"messages": [USER]}, "no_answer", "no message of the assistant; roles: user"),
        ("messages", {"messages": []}, "no_answer", "roles: none"),
        ("messages", {"messages": [ANSWER, USER, ANSWER]}, "bad_role", "must be the user's, not the assistant's"),
        (
            "messages",
            {"messages": [USER, {"role": "system", "content": "s"}, ANSWER]},
            "bad_role",
            "message 2: a system",
        ),
        ("prompt_completion", {"prompt": "x", "completion": ""}, "empty_answer", "'completion' is empty"),
        ("prompt_completion", {"prompt": 1, "completion": "y"}, "wrong_type", "field 'prompt' is a number, not text"),
        ("alpaca", {"instruction": "x"}, "missing_field", "field 'output' is not there; the row has instruction"),
        ("alpaca", {"instruction": "x", "output": ""}, "empty_answer", "empty"),
        ("alpaca", {"instruction": "x", "output": "y", "input": [1]}, "wrong_type", "'input' is a list"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "bad_role", "unknown role 'alien'"),
        ("sharegpt", {"conversations": [{"from": {}, "value": "x"}]}, "missing_field", "message 1 has no 'from'"),
        ("sharegpt", {"conversations": [{"from": ["gpt"], "value": "x"}]}, "missing_field", "message 1 has no 'from'"),
        ("sharegpt", {"conversations": TURNS, "system": 1}, "wrong_type", "field 'system' is a number, not text"),
        ("sharegpt", {"conversations": TURNS, "tools": "f"}, "wrong_type", "field 'tools' is text, but not JSON"),
        ("sharegpt", {"conversations": TURNS, "tools": [1]}, "wrong_type", "field 'tools' has a number in it"),
        ("sharegpt", {"conversations": TURNS, "tools": DEEP}, "wrong_type", "nested too deeply"),
        ("messages", {"messages": DEEP}, "wrong_type", "nested too deeply"),
        ("messages", {"messages": "1" * 5000}, "wrong_type", "is text, not a list of messages"),
        ("messages", {"messages": [USER, {**ANSWER, "weight": 0.5}]}, "wrong_type", "message 2: weight is 0.5"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image", "text": "", "image": "a.png"}]}, ANSWER]},
            "wrong_type",
            "message 1: 'content' has a part of type 'image', which is not text",
        ),
        ("messages", {"messages": [USER, {**ANSWER, "tool_calls": "f()"}]}, "wrong_type", "is text, but not JSON"),
        (
            "messages",
            {"messages": [USER, {**ANSWER, "tool_calls": {}}]},
            "wrong_type",
            "an object, not a list of objects",
        ),
        (
            "messages",
            {"messages": [{"role": "human", "content": "x"}]},
            "bad_role",
            "'human' is a role of format sharegpt",
        ),
        ("messages", {"messages": [{"role": "User", "content": "x"}]}, "bad_role", "(write 'user')"),
        ("messages", {"messages": [{"role": "function", "content": "x"}]}, "bad_role", "('function' is 'tool' now)"),
        ("messages", {"messages": TURNS}, "missing_field", "rows with from and value are of format sharegpt"),
        ("messages", {"instruction": "x", "output": "y"}, "missing_field", "the row has instruction, output"),
        (
            "alpaca",
            {"instruction": "x", "output": "y", "history": [["q"]]},
            "wrong_type",
            "not a list of [question, answer]",
        ),
        ("text", {"text": " \n"}, "empty_text", "empty"),
    ],
)
def test_rows_that_cannot_be_used(format: str, row: Any, reason: str, message: str) -> None:
    with pytest.raises(Rejected) as caught:
        to_example(format, row, {})
    assert caught.value.reason == reason
    assert message in caught.value.message


def test_a_message_about_a_row_is_one_line() -> None:
    with pytest.raises(Rejected) as caught:
        to_example("messages", {"a\nb\ud800": 1, "c" * 900: 2}, {})
    assert caught.value.message.startswith("field 'messages' is not there; the row has a b\\ud800, ccc")
    assert len(caught.value.message) < 500


def test_a_mapped_field_is_named_as_in_the_file() -> None:
    with pytest.raises(Rejected, match=r"field 'question' \(data fields: prompt\) is not there; the row has q, a"):
        to_example("prompt_completion", {"q": "x", "a": "y"}, {"prompt": "question"})


def test_an_unknown_name_in_fields() -> None:
    with pytest.raises(UserError, match=r"data.train.0.fields: format text has no field 'txet'; it has text"):
        check_fields("text", {"txet": "body"}, "data.train.0")
