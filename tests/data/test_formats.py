import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from pyarrow import parquet

from olora_ray.data.formats import to_example
from olora_ray.data.formats.format import Chat, Completion, Rejected
from tests.tokens.helpers import chat


def read(format: str, row: Any, **fields: str) -> Chat:
    example = to_example(format, row, fields, as_chat=True)
    assert isinstance(example, Chat)
    return example


def roles(format: str, row: Any, **fields: str) -> list[tuple[str, str]]:
    return [
        (message["role"], message["content"]) for message in read(format, row, **fields).messages
    ]


QA = [("user", "q"), ("assistant", "a")]


def test_messages() -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a", "name": None},
    ]
    assert roles("messages", {"chat": parts}, messages="chat") == QA
    assert "name" not in read("messages", {"chat": parts}, messages="chat").messages[1]
    as_text = {"messages": json.dumps(chat("q", "a")["messages"]), "tools": '[{"type": "f"}]'}
    assert roles("messages", as_text) == roles("messages", chat("q", "a")) == QA
    assert read("messages", as_text).tools == ({"type": "f"},)


@pytest.mark.parametrize(
    ("content", "given"), [(None, [{"id": "1"}]), ("a", []), ("a", ""), ("a", "[]"), ("a", None)]
)
def test_a_tool_call_is_an_answer_and_no_calls_are_no_key(content: Any, given: Any) -> None:
    # Servers answer with `"tool_calls": []`; Llama 3.1's template refuses each message with this key unless it has one
    # call.
    calls = {"tool_calls": given} if content is None else {}
    turns = [USER, {"role": "assistant", "content": content, "tool_calls": given}]
    assert read("messages", {"messages": turns}).messages[1] == {
        "role": "assistant",
        "content": content or "",
        **calls,
    }


def test_prompt_completion() -> None:
    fields = {"prompt": "question", "completion": "answer"}
    row = {"question": "q ", "answer": "a", "tools": [{"type": "f"}]}
    assert roles("prompt_completion", row, **fields) == [("user", "q "), ("assistant", "a")]
    assert read("prompt_completion", row, **fields).tools == ({"type": "f"},)
    messages = chat("q", "a")["messages"]
    lists = {"prompt": messages[:1], "completion": messages[1:]}
    assert roles("prompt_completion", lists) == QA
    with pytest.raises(Rejected):
        to_example("prompt_completion", lists, {})
    with pytest.raises(Rejected):
        to_example("prompt_completion", row, fields)
    assert to_example("prompt_completion", {**row, "tools": "[]"}, fields) == Completion("q ", "a")


def test_answers_in_a_prompt_of_messages_are_given_and_one_of_the_completion_is_needed() -> None:
    turns = [*chat("2 + 2", "4")["messages"], *chat("3 + 3", "6")["messages"]]
    lists = {"prompt": turns[:3], "completion": turns[3:]}
    for row in (
        lists,
        {name: json.dumps(value) for name, value in lists.items()},
    ):  # as csv has them
        answers = [
            each for each in read("prompt_completion", row).messages if each["role"] == "assistant"
        ]
        assert [answer.get("weight", 1) for answer in answers] == [0, 1]
    for none in ([], turns[2:3]):
        with pytest.raises(
            Rejected, match="no_answer: field 'completion' has no assistant message"
        ):
            read("prompt_completion", {"prompt": turns[:2], "completion": none})
    for text in ("[1, 2]", "[{]", '[{"role": "user"}]', "[]"):
        assert roles("prompt_completion", {"prompt": text, "completion": "x"}) == [
            ("user", text),
            ("assistant", "x"),
        ]
    # A message with only a tool call has no content, also in a csv cell.
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    cells = {
        "prompt": json.dumps([USER]),
        "completion": json.dumps([{"role": "assistant", "tool_calls": [call]}]),
    }
    assert read("prompt_completion", cells).messages[1]["tool_calls"] == [call]


def test_turns_as_a_sequence_of_datasets_are_stored(tmp_path: Path) -> None:
    turns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    text = datasets.Value("string")
    features = datasets.Features({"messages": datasets.Sequence({"role": text, "content": text})})
    datasets.Dataset.from_list([{"messages": turns}], features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    [row] = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert row == {"messages": turns}
    assert roles("messages", row) == QA
    assert (
        roles("sharegpt", {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}) == QA
    )
    parts = {
        "prompt": {"role": ["user"], "content": ["q"]},
        "completion": {"role": ["assistant"], "content": ["a"]},
    }
    assert roles("prompt_completion", parts) == QA
    with pytest.raises(Rejected):
        read("messages", {"messages": {"role": ["user", "assistant"], "content": ["q"]}})


DEEP = "[" * 100_000
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]


def test_sharegpt() -> None:
    row = {"conversations": TURNS, "system": "s", "tools": '[{"name": "f"}]'}
    example = read("sharegpt", row)
    assert roles("sharegpt", row) == [("system", "s"), *QA]
    assert example.tools == ({"name": "f"},)
    assert example.messages[-1] == {"role": "assistant", "content": "a", "weight": 0}
    for empty in ({"system": ""}, {"system": None, "tools": "[]"}, {}):
        assert read("sharegpt", {"conversations": TURNS, **empty}) == Chat(example.messages[1:])
    assert read("sharegpt", {"conversations": TURNS, "system": 3}, system="none") == Chat(
        example.messages[1:]
    )
    twice = [{"from": "system", "value": "s"}, *TURNS]
    assert read("sharegpt", {**row, "conversations": twice}) == example
    with pytest.raises(
        Rejected, match="field 'system' and the first message have different system messages"
    ):
        read("sharegpt", {**row, "conversations": twice, "system": "other"})
    renamed = {"turns": [{"role": "user", "text": "q"}, {"role": "model", "text": "a"}]}
    assert (
        roles("sharegpt", renamed, **{"conversations": "turns", "from": "role", "value": "text"})
        == QA
    )


def test_tool_calls_of_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "X"}}'},
        {"from": "observation", "value": "yes"},
        {"from": "gpt", "value": "It rains."},
    ]
    messages = read("sharegpt", {"conversations": turns}).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "X"}}}
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    for broken in ("weather(X)", "[]", '{"arguments": {}}', None):
        with pytest.raises(
            Rejected, match="message 2: the value of a function_call is not JSON text"
        ):
            read(
                "sharegpt",
                {"conversations": [turns[0], {"from": "function_call", "value": broken}]},
            )


PICTURE = {"role": "user", "content": [{"type": "image", "text": "", "image": "a.png"}]}


def turns(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def said(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"conversations": list(messages), **more}


@pytest.mark.parametrize(
    ("format", "row", "reason", "message"),
    [
        ("messages", [1], "not_an_object", "expected an object with fields, found a list"),
        (
            "messages",
            {"messages": "hello"},
            "wrong_type",
            "field 'messages' is text, not a list of messages",
        ),
        ("messages", {"messages": DEEP}, "wrong_type", "nested too deeply"),
        ("messages", turns({"role": "Kunde"}), "bad_role", "message 1: unknown role 'Kunde'"),
        ("messages", turns(USER, {**ANSWER, "content": " "}), "empty_answer", "message 2"),
        (
            "messages",
            turns({**ANSWER, "role": "tool"}, USER, ANSWER),
            "bad_role",
            "needs one from user before it",
        ),
        ("messages", turns(ANSWER, USER), "no_answer", "follows one from user"),
        ("messages", turns({**USER, "role": "system"}), "no_messages", "no messages"),
        ("turns", {"turns": ["q", {"input": "q"}]}, "missing_field", "turn 2 is no pair"),
        ("turns", {"turns": [3, 4]}, "wrong_type", "turn 1 is a number"),
        (
            "messages",
            turns(PICTURE, ANSWER),
            "wrong_type",
            "message 1: 'content' has a part of type 'image', which is",
        ),
        (
            "messages",
            turns(USER, {**ANSWER, "tool_calls": "f()"}),
            "wrong_type",
            "is text, but not JSON",
        ),
        ("messages", turns(*TURNS), "missing_field", "from and value need format: sharegpt"),
        (
            "prompt_completion",
            {"prompt": "x", "completion": ""},
            "empty_answer",
            "'completion' is empty",
        ),
        (
            "alpaca",
            {"instruction": "x", "output": "y", "history": [["q"]]},
            "wrong_type",
            "not a list of [question,",
        ),
        (
            "sharegpt",
            said({"from": ["gpt"], "value": "x"}),
            "missing_field",
            "message 1 has no 'from'",
        ),
        ("text", {"text": " \n"}, "empty_text", "empty"),
    ],
)
def test_rows_that_cannot_be_used(format: str, row: Any, reason: str, message: str) -> None:
    with pytest.raises(Rejected) as caught:
        to_example(format, row, {})
    assert caught.value.reason == reason
    assert message in caught.value.message


def test_a_mapped_field_is_named_as_in_the_file() -> None:
    with pytest.raises(
        Rejected, match=r"field 'question' \(set as prompt in fields\) is missing; the row has q, a"
    ):
        to_example("prompt_completion", {"q": "x", "a": "y"}, {"prompt": "question"})
