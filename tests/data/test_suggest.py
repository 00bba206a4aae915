"""What a person may have meant with a file that does not fit its format."""

from typing import Any

import pytest

from olora_ray.data.formats import columns

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


OASST = {"message_id": "m", "parent_id": None, "text": "hello", "role": "prompter"}
"""One message of a tree: no document."""


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("prompt_completion", {"question": "q", "answer": "a"}, "fields: {prompt: question, completion: answer}"),
        ("prompt_completion", {"Question": "q", "completion": "a"}, "fields: {prompt: Question}"),
        (
            "alpaca",
            {"prompt": "q", "response": "a", "id": 3},
            "fields: {instruction: prompt, output: response} (leaves out id)",
        ),
        ("messages", {"conversation": MESSAGES}, "fields: {messages: conversation}"),
        ("messages", {"instruction": "q", "input": "", "output": "a"}, "format: alpaca"),
        ("messages", {"prompt": "q", "completion": "a"}, "format: prompt_completion"),
        (
            "messages",
            {"question": "q", "answer": "a"},
            "format: alpaca, fields: {instruction: question, output: answer}",
        ),
        ("messages", {"text": "some text"}, "format: text"),
        (
            "prompt_completion",
            {"text": "x", "query": "q", "label": "a"},
            "fields: {prompt: query, completion: label} (leaves out text)",
        ),
        (
            "prompt_completion",
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},  # Dolly
            "format: alpaca, fields: {output: response, input: context} (leaves out category)",
        ),
        (
            "alpaca",
            {"prompt": MESSAGES[:1], "completion": MESSAGES[1:], "tools": "[]"},
            "format: prompt_completion",
        ),
        ("messages", {"conversations": TURNS}, "format: sharegpt"),
        ("sharegpt", {"messages": MESSAGES}, "format: messages"),
    ],
)
def test_what_is_suggested_reads_the_row(format: str, row: dict[str, Any], expected: str) -> None:
    assert columns(format, row) == expected


@pytest.mark.parametrize("row", [{"a": 1, "b": 2}, {"prompt": "q"}, {}, [1], "x", {"messages": []}, OASST])
def test_nothing_is_suggested_that_does_not_help(row: Any) -> None:
    assert columns("messages", row) is None
