from typing import Any

import pytest

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


def test_prompt_completion() -> None:
    fields = {"prompt": "question", "completion": "answer"}
    assert to_example("prompt_completion", {"question": "q", "answer": "a"}, fields) == Completion("q", "a")
    messages = chat("q", "a")["messages"]
    assert roles(to_example("prompt_completion", {"prompt": messages[:1], "completion": messages[1:]}, {}))[0] == (
        "user",
        "q",
    )


def test_alpaca() -> None:
    row = {"instruction": "Sum up.", "input": "A text.", "output": "Short."}
    assert roles(to_example("alpaca", row, {})) == [("user", "Sum up.\n\nA text."), ("assistant", "Short.")]
    assert roles(to_example("alpaca", {**row, "input": ""}, {}))[0] == ("user", "Sum up.")
    assert roles(to_example("alpaca", {**row, "system": "Be kind."}, {}))[0] == ("system", "Be kind.")


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


def test_text() -> None:
    assert to_example("text", {"body": "abc"}, {"text": "body"}) == Text("abc")


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
        ("text", {"text": " \n"}, "empty_text", "empty"),
    ],
)
def test_rows_that_cannot_be_used(format: str, row: Any, reason: str, message: str) -> None:
    with pytest.raises(Rejected) as caught:
        to_example(format, row, {})
    assert caught.value.reason == reason
    assert message in caught.value.message


def test_a_mapped_field_is_named_as_in_the_file() -> None:
    with pytest.raises(Rejected, match=r"field 'question' \(data fields: prompt\) is not there; the row has q, a"):
        to_example("prompt_completion", {"q": "x", "a": "y"}, {"prompt": "question"})


def test_an_unknown_name_in_fields() -> None:
    with pytest.raises(UserError, match=r"data.train.0.fields: format text has no field 'txet'; it has text"):
        check_fields("text", {"txet": "body"}, "data.train.0")
