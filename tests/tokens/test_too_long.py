"""Rows of more than data.max_length tokens: rejected, cut, or without their last turns."""

from pathlib import Path
from typing import Any

import pytest

from olora_ray.data.formats.format import Chat, Completion, Example, Rejected
from olora_ray.data.tokenize import ExampleTokenizer
from olora_ray.tokens.prepare import plan_here, prepare
from olora_ray.tokens.preview import describe
from olora_ray.train.generate import questions
from tests.data.test_chat_template import ALL, conversation
from tests.data.test_tokenize import marked
from tests.said import said
from tests.tokens import helpers

CHAT = Chat(tuple(conversation("hi", "one", "more", "two")))
PAIR = Completion("say:", "one")
FIRST = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[one<|im_end|>]]"
PROMPT = f"{FIRST}\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
CONTEXT = PROMPT.replace("[[", "").replace("]]", "")
THINKS = FIRST.replace("one", "<think></think>\none")


def left(
    example: Example,
    too_long: str,
    most: int,
    template: str = helpers.CHATML,
    last_turn_only: bool = False,
) -> list[str]:
    """The tokens that are left of an example, with [[supervised]] parts in brackets."""
    tokenize = ExampleTokenizer(helpers.spec(template), most, last_turn_only, too_long)
    return [marked(tokens) for tokens in tokenize(example)]


@pytest.mark.parametrize(
    ("too_long", "most", "expected"),
    [
        ("cut", 53, f"{PROMPT}[[two<|im_end|>]]"),
        ("cut", 51, f"{PROMPT}[[tw]]"),
        ("cut", 47, PROMPT[:-2]),
        ("cut", 22, FIRST.replace("ne<|im_end|>", "")),
        ("drop_turns", 54, f"{PROMPT}[[two<|im_end|>]]\n"),
        ("drop_turns", 53, f"{PROMPT}[[two<|im_end|>]]"),
        ("drop_turns", 52, FIRST),
        ("drop_turns", 25, FIRST),
    ],
)
def test_what_is_left_of_a_chat(too_long: str, most: int, expected: str) -> None:
    assert left(CHAT, too_long, most) == [expected]


@pytest.mark.parametrize(("too_long", "most"), [("cut", 21), ("drop_turns", 24), ("reject", 53)])
def test_a_chat_of_which_no_answer_is_left_is_rejected(too_long: str, most: int) -> None:
    with pytest.raises(
        Rejected, match=f"^too_long: 54 tokens, more than data.max_length = {most}$"
    ):
        left(CHAT, too_long, most)


@pytest.mark.parametrize("too_long", ["cut", "drop_turns"])
def test_a_prompt_and_its_completion_are_cut_and_have_no_turns(too_long: str) -> None:
    for most, expected in (
        (9, ["<s>say:[[one</s>]]"]),
        (8, ["<s>say:[[one]]"]),
        (6, ["<s>say:[[o]]"]),
    ):
        if too_long == "cut" or most == 9:
            assert left(PAIR, too_long, most) == expected
    with pytest.raises(Rejected):
        left(PAIR, too_long, 5 if too_long == "cut" else 8)


def test_of_answers_that_are_examples_of_their_own_those_that_fit_stay() -> None:
    assert left(CHAT, "drop_turns", 68, ALL["qwen3"]) == [f"{THINKS}\n"]
    assert left(CHAT, "cut", 52, ALL["qwen3"]) == [f"{THINKS}\n", f"{CONTEXT}[[<th]]"]
    with pytest.raises(Rejected):
        left(CHAT, "reject", 40, ALL["qwen3"])


@pytest.mark.parametrize("too_long", ["cut", "drop_turns"])
def test_shortened_rows_are_counted_and_told_and_none_of_their_answers_is_asked_for(
    too_long: str, tmp_path: Path
) -> None:
    turns = [conversation("hi", f"one {n}", "more", "two" * (9 * n)) for n in range(1, 5)]
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [{"messages": each} for each in turns])
    other = helpers.write_jsonl(tmp_path / "b.jsonl", [helpers.chat("q", "a")])
    spec = helpers.spec()

    def made(**data: Any) -> Any:
        config = helpers.config(
            tmp_path / "runs", other, eval=[str(path)], max_rejected=1.0, **data
        )
        with said() as lines:
            store = prepare(config, spec, "eval")
        with said() as shown:
            describe(config, spec, "eval")
        return (
            store,
            [line for line in lines if "too_long:" in line],
            shown,
            plan_here(config, spec, "eval"),
        )

    whole, lines, _, plan = made()
    assert (whole.manifest.rejected, lines) == ({"too_long": 2}, [])
    assert "too_long" not in plan.inputs()  # stores that are there keep their names
    store, [line], shown, plan = made(too_long=too_long)
    assert not store.manifest.rejected
    assert store.manifest.notes[too_long] == 2
    assert line.startswith("tokens: eval: ")
    assert line.replace("tokens: eval:", "of the rows read,") in shown
    assert store.digest == plan.digest() != whole.digest
    asked = [helpers.decode(question.reference) for question in questions(store, 9)]
    dropped = [] if too_long == "cut" else ["one 3<|im_end|>", "one 4<|im_end|>"]
    assert sorted(asked) == sorted([*dropped, *(f"{'two' * 9 * n}<|im_end|>" for n in (1, 2))])
