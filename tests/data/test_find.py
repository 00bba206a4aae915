"""Detection of format and fields for rows whose source sets none: what the files of test_other_tools.py do not show."""

from typing import Any

import pytest

from olora_ray.data.detect import Rivals, find, why_not

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
QUESTION = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("row", "format", "fields"),
    [
        (
            {"Question": "q", "completion": "a"},
            "prompt_completion",
            {"prompt": "Question"},
        ),
        (
            {"prompt": "q", "completion": "a", "context": "c"},
            "alpaca",
            {"instruction": "prompt", "output": "completion", "input": "context"},
        ),
        (
            {"instruction": "q", "output": "a", "tools": "[{}]"},
            "prompt_completion",
            {"prompt": "instruction", "completion": "output"},
        ),
        ({"conversations": TURNS, "messages": MESSAGES}, "messages", {}),
        ({"problem": "p", "solution": "s", "messages": MESSAGES}, "messages", {}),
        ({"content": "some text"}, "text", {"text": "content"}),
    ],
)
def test_what_is_found_reads_the_row(
    row: dict[str, Any], format: str, fields: dict[str, str]
) -> None:
    found = find([row], {})
    assert found is not None
    assert (found.format, found.fields) == (format, fields)
    assert found.used == 1


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({**QUESTION, "response": "b"}, ("question and answer", "question and response")),
        (
            {"instruction": "i", "output": "o", "prompt": "p", "completion": "c"},
            ("instruction and output", "prompt and completion"),
        ),
    ],
)
def test_rows_that_say_more_than_one_way_can_tell(
    row: dict[str, Any], columns: tuple[str, ...]
) -> None:
    with pytest.raises(Rivals) as caught:
        find([row], {})
    assert all(each in str(caught.value) for each in columns)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"a": 1, "b": 2}, None),
        ([1], "expected an object with fields, found a list"),
        (
            {"question": "q", "answer": [4]},
            "field 'answer' is a list, not text; name a value in it, such as answer.0",
        ),
    ],
)
def test_nothing_is_found_that_does_not_help(row: Any, reason: str | None) -> None:
    assert find([row], {}) is None
    why = why_not(row, {})
    assert (why.message if why else None) == reason


@pytest.mark.parametrize(
    ("given", "chat", "fields"),
    [
        ({"prompt": "question"}, "auto", {"prompt": "question", "completion": "answer"}),
        (
            {"output": "question", "instruction": "answer"},
            "auto",
            {"instruction": "answer", "output": "question"},
        ),
        ({"question": "none"}, "auto", None),
        ({}, False, {"prompt": "question", "completion": "answer"}),
    ],
)
def test_what_a_source_sets_stays(
    given: dict[str, str], chat: Any, fields: dict[str, str] | None
) -> None:
    found = find([QUESTION], given, chat)
    assert (found.fields if found else None) == fields


def test_rows_that_are_far_fewer_do_not_decide() -> None:
    odd, rows = [{"instruction": "q", "output": "a"}] * 9, [{"conversations": TURNS}] * 20
    found = find([*odd, *rows], {})
    assert found is not None
    assert (found.format, found.used) == ("sharegpt", 20)
