"""Texts that hold a whole chat in another tool's markup become chats: only the answers are supervised."""

from pathlib import Path
from typing import Any, get_args

import pytest

from olora_ray.cluster.decide import DataFacts, Lengths, decide_data
from olora_ray.config.decided import Kept
from olora_ray.config.section import Markup
from olora_ray.data import detect
from olora_ray.data.formats.format import Rejected
from olora_ray.data.formats.markup import MARKUPS, turns_in
from olora_ray.tokens.preview import describe
from tests import tiny
from tests.said import said
from tests.tokens import helpers

ALPACA = (
    "Below is an instruction that describes a task, paired with an input. Write a response.\n\n"
)
GLAIVE = {
    "system": "SYSTEM: You are a helpful assistant.",
    "chat": "USER: Hi\n\n\nASSISTANT: <functioncall> {} <|endoftext|>\n\n\nFUNCTION RESPONSE: {}\n\n\n"
    "ASSISTANT: Done. <|endoftext|>\n\n\n",
}
PUBLISHED: dict[Markup, tuple[dict[str, str], str]] = {
    "guanaco": (
        {"text": "### Human: Hi### Assistant: Hello\nyou### Human: Bye### Assistant: Ciao"},
        "user Hi|assistant Hello\nyou|user Bye|assistant Ciao",
    ),
    "llama2": (
        {
            "text": "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST] Ciao </s>"
        },
        "system Be kind|user Hi|assistant Hello|user Bye|assistant Ciao",
    ),
    "llama3": (
        {
            "text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|end_of_text|>"
        },
        "user Hi|assistant Hello",
    ),
    "chatml": (
        {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"},
        "user Hi|assistant Hello",
    ),
    "instruction": (
        {"text": f"{ALPACA}### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3"},
        "user Add\n\n1 2|assistant 3",
    ),
    "glaive": (
        GLAIVE,
        "system You are a helpful assistant.|user Hi|assistant <functioncall> {}|tool {}|assistant Done.",
    ),
}


def config(folder: Path, rows: list[Any], **source: Any) -> Any:
    path = helpers.write_jsonl(folder / "a.jsonl", rows)
    return helpers.config(folder / "runs", {"path": str(path), **source}, max_length=512)


@pytest.mark.parametrize("name", get_args(Markup))
def test_a_published_row_is_read_as_its_chat(name: Markup, tmp_path: Path) -> None:
    row, expected = PUBLISHED[name]
    assert {*MARKUPS} == {*PUBLISHED}
    with said() as told:
        known = tiny.read_as(config(tmp_path, [row] * 12))
    assert f"markup {name}: only the answers are trained" in told[0]
    (source,) = known.data.train
    assert (source.format, source.markup) == ("messages", name)
    example = describe(known, helpers.spec()).examples[0]
    text = helpers.decode(example.input_ids)
    turns = [part.replace("\n", " ", 1) for part in text.split("<|im_start|>")[1:]]
    assert "|".join(turn.partition("<|im_end|>")[0] for turn in turns) == expected
    answers = [
        part.split(" ", 1)[1] for part in expected.split("|") if part.startswith("assistant")
    ]
    supervised = helpers.decode(example.input_ids[example.mask])
    assert supervised == "".join(f"{answer}<|im_end|>" for answer in answers)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("guanaco", "Notes. ### Human: Hi ### Assistant: Hello", "character 1, 'Notes. "),
        (
            "chatml",
            "<|im_start|>user\nHi<|im_end|>\nmore<|im_start|>assistant\nHello<|im_end|>",
            "character 31, 'more<|im_start|>",
        ),
        ("llama2", "[INST] Hi", "no question with its answer; roles: user"),
        ("llama3", "Hi", "no turn begins"),
    ],
)
def test_a_text_that_is_not_all_markup_is_rejected_with_the_place(
    name: Markup, text: str, place: str
) -> None:
    with pytest.raises(Rejected) as caught:
        turns_in(text, name)
    assert place in caught.value.message


def test_texts_stay_texts_if_said_so_or_not_all_of_them_are_chats(tmp_path: Path) -> None:
    chats = [PUBLISHED["guanaco"][0]] * 9
    for source in ({"markup": "none"}, {"chat": False}, {"format": "text"}):
        (found,) = tiny.read_as(config(tmp_path, chats, **source)).data.train
        assert found.format == "text"
    mixed = [*chats, {"text": "Notes. ### Human: Hi ### Assistant: Hello"}]
    with said() as told:
        (found,) = tiny.read_as(config(tmp_path, mixed)).data.train
    assert found.format == "text"
    assert "9 of 10 texts are chats in markup guanaco, but markup guanaco: character 1" in told[0]
    # A source that sets the markup reads those that are.
    (found,) = tiny.read_as(config(tmp_path, mixed, markup="guanaco")).data.train
    assert (found.format, found.fields) == ("messages", {"messages": "text"})
    (given,) = config(tmp_path, mixed, markup="guanaco", format="text").data.train
    assert (given.format, given.fields) == ("messages", {"messages": "text"})


def test_the_markup_is_decided_once_and_an_earlier_run_keeps_its_texts(tmp_path: Path) -> None:
    given = config(tmp_path, [PUBLISHED["guanaco"][0]] * 12)
    facts = DataFacts(detect.check_data(given), Lengths(300, 12, True, 0, 512))
    made = decide_data(given, helpers.spec(), facts)
    assert made.decisions["data.train.0.markup"].value == "guanaco"
    assert "markup" in made.decisions["data.train.0.markup"].why
    again = Kept(decisions=made.decisions)
    assert decide_data(given, helpers.spec(), DataFacts(), again).config == made.config
    earlier = Kept(settings={"data.train.0.format": "text"})
    (source,) = decide_data(given, helpers.spec(), facts, earlier).config.data.train
    assert (source.format, source.markup) == ("text", "auto")
