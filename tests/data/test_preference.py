"""Preference pairs in the schemas of other tools: what is right, what is wrong, and the messages before both."""

import json
from pathlib import Path
from typing import Any

import pytest

from olora_ray.data.formats import to_example
from olora_ray.data.formats.format import Chat, Completion, Pair, Rated, Rejected
from tests import tiny
from tests.refused import refused

USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Air scatters blue light more."}
BAD = {"role": "assistant", "content": "It reflects the sea."}
FIRST = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
HUMAN, MACHINE = "\n\nHuman: ", "\n\nAssistant: "
HH = f"{HUMAN}Hi{MACHINE}Hello{HUMAN}{USER['content']}{MACHINE}"
SYSTEM = {"role": "system", "content": "Be brief."}

ROWS: dict[str, tuple[list[dict[str, str]], dict[str, Any]]] = {
    "TRL, texts": (
        [USER],
        {"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
    ),
    "TRL, messages": ([USER], {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
    "TRL, whole conversations": (
        [*FIRST, USER],
        {"chosen": [*FIRST, USER, GOOD], "rejected": [*FIRST, USER, BAD]},
    ),
    "ultrafeedback_binarized": (
        [USER],
        {
            "prompt": USER["content"],
            "prompt_id": "a1",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
    ),
    "hh-rlhf": (
        [*FIRST, USER],
        {"chosen": f"{HH}{GOOD['content']}", "rejected": f"{HH}{BAD['content']}"},
    ),
    "LLaMA-Factory, sharegpt": (
        [USER],
        {
            "conversations": [{"from": "human", "value": USER["content"]}],
            "chosen": {"from": "gpt", "value": GOOD["content"]},
            "rejected": {"from": "gpt", "value": BAD["content"]},
        },
    ),
    "LLaMA-Factory, alpaca": (
        [{"role": "user", "content": "Answer.\n\nWhy?"}],
        {
            "instruction": "Answer.",
            "input": "Why?",
            "chosen": GOOD["content"],
            "rejected": BAD["content"],
        },
    ),
    "orca_dpo_pairs": (
        [SYSTEM, USER],
        {
            "system": SYSTEM["content"],
            "question": USER["content"],
            "chosen": GOOD["content"],
            "rejected": BAD["content"],
        },
    ),
    "distilabel-intel-orca-dpo-pairs": (
        [USER],
        {
            "system": "",
            "input": USER["content"],
            "chosen": GOOD["content"],
            "rejected": BAD["content"],
            "generations": ["a", "b"],
            "rating": [9.0, 2.0],
            "status": "unchanged",
            "chosen_score": 9.0,
        },
    ),
    "OpenAI": (
        [USER],
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
    ),
    "Anthropic": (
        [*FIRST, USER],
        {"prompt": HH, "chosen": GOOD["content"], "rejected": BAD["content"]},
    ),
    "messages beside two answers": (
        [SYSTEM, USER],
        {"messages": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD},
    ),
    "a system prompt beside whole conversations": (
        [SYSTEM, USER],
        {"system": SYSTEM["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ),
    "answers of a question": (
        [USER],
        {"question": USER["content"], "answer": GOOD["content"], "rejected_answer": BAD["content"]},
    ),
    "ms-swift": (
        [SYSTEM, USER],
        {"messages": [SYSTEM, USER, GOOD], "rejected_response": BAD["content"]},
    ),
}


def config(folder: Path, row: dict[str, Any], **source: Any) -> Any:
    """A config of rows of this form."""
    path = folder / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 12)
    return tiny.config(data__train=[{"path": str(path), **source}])


def source_of(folder: Path, row: dict[str, Any]) -> Any:
    """The source as the first look reads it."""
    return tiny.read_as(config(folder, row)).data.train[0]


@pytest.mark.parametrize("name", ROWS)
def test_pairs_of_other_tools_are_read_without_a_setting(name: str, tmp_path: Path) -> None:
    prompt, row = ROWS[name]
    source = source_of(tmp_path, row)
    found = to_example(source.format, row, source.fields, True, source)
    assert isinstance(found, Pair)
    for chat, answer in zip(found, (GOOD, BAD), strict=True):
        assert isinstance(chat, Chat)
        plain = [{key: turn[key] for key in ("role", "content")} for turn in chat.messages]
        assert plain == [*prompt, answer]
        assert [turn.get("weight") for turn in chat.messages if turn["role"] == "assistant"][
            :-1
        ] in ([], [0])


def test_texts_are_joined_where_no_chat_is_wanted() -> None:
    row = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
    assert to_example("preference", row, {}) == Pair(
        Completion("2 + 2 = ", "4"), Completion("2 + 2 = ", "5")
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, "missing_field"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same_answers"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty_answer"),
        ({"chosen": "b", "rejected": "c"}, "missing_field"),
        ({"chosen": [USER, GOOD], "rejected": [FIRST[0], BAD]}, "missing_field"),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "wrong_type"),
        ({"chosen": [USER, GOOD], "rejected": [USER, USER]}, "no_answer"),
    ],
)
def test_rows_that_are_no_pair(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Rejected) as why:
        to_example("preference", row, {}, as_chat=True)
    assert why.value.reason == reason


def test_a_column_of_rejected_answers_without_values_needs_an_answer(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": None}
    with refused("rejected: none"):
        source_of(tmp_path, row)
    fields = {"rejected": "none"}
    assert (
        tiny.read_as(config(tmp_path, row, fields=fields)).data.train[0].format
        == "prompt_completion"
    )


PLAIN = {"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]}
MARKED = {"messages": [USER, GOOD], "rejected": True}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rejected": GOOD["content"]}, "same_answers: chosen and rejected are the same"),
        ({"rejected": [BAD]}, "must both be texts, or both be messages"),
        ({"prompt": None}, "add a column prompt"),
    ],
)
def test_the_first_look_says_why_rows_are_no_pairs(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with refused(told):
        source_of(tmp_path, PLAIN | change)


def test_a_mark_that_an_answer_was_rejected_is_no_answer(tmp_path: Path) -> None:
    with refused("column 'rejected' may decide"):
        source_of(tmp_path, MARKED)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a b", "answer": "c", "thumb": "up"},
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}],
            "kto_tag": 1,
        },
    ],
)
def test_ratings_of_other_tools_are_read_without_a_setting(
    row: dict[str, Any], tmp_path: Path
) -> None:
    source = source_of(tmp_path, row)
    found = to_example(source.format, row, source.fields, True, source)
    assert isinstance(found, Rated)
    assert found.up
