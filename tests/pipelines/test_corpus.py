import importlib.util
import json
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

QUICKSTART = Path(__file__).parents[2] / "pipelines" / "quickstart"
HALVES = ("train", "heldout")
CATEGORIES = {"delivery", "refund", "defect", "account", "question"}


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_corpus", QUICKSTART / "make_corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def vocabulary() -> Any:
    return json.loads((QUICKSTART / "vocabulary.json").read_text(encoding="utf-8"))


@cache
def rows(half: str) -> list[tuple[str, dict[str, Any]]]:
    """The message and the answer of each row."""
    lines = (QUICKSTART / f"{half}.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    return [(message, json.loads(answer)) for _, message, answer in chats]


def product_words(half: str) -> set[str]:
    names = " ".join(name for part in ("brands", "modifiers", "nouns", "models") for name in vocabulary()[half][part])
    return set(re.findall(r"\w+", names.lower()))


def phrases(half: str) -> set[str]:
    """Everything that stands in a message and is no part of a product."""
    words = vocabulary()[half]
    frames = [frame for frames in words["categories"].values() for frame in frames]
    parts = ("names", "greetings", "closings", "chatter", "order_inline", "order_sentences", "high", "low")
    return set(frames).union(*(words[part] for part in parts))


def word_runs(half: str, length: int) -> set[tuple[str, ...]]:
    runs = set()
    for message, _ in rows(half):
        words = re.findall(r"[a-z']+", message.lower())
        runs |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return runs


@pytest.mark.parametrize("half", HALVES)
def test_the_committed_file_is_what_the_generator_writes(half: str) -> None:
    assert generator().corpus(half).encode() == (QUICKSTART / f"{half}.jsonl").read_bytes()


def test_the_halves_have_the_promised_size() -> None:
    assert {half: len(rows(half)) for half in HALVES} == generator().ROWS


def test_no_word_of_a_heldout_product_occurs_in_a_training_product() -> None:
    assert not product_words("train") & product_words("heldout")


def test_no_heldout_phrase_is_a_training_phrase() -> None:
    assert not phrases("train") & phrases("heldout")


def test_no_five_words_in_a_row_are_shared() -> None:
    assert not word_runs("train", 5) & word_runs("heldout", 5)


@pytest.mark.parametrize("half", HALVES)
def test_product_and_order_occur_literally_in_the_message(half: str) -> None:
    for message, answer in rows(half):
        assert answer["product"] in message
        assert answer["order"] is None or answer["order"] in message


@pytest.mark.parametrize("half", HALVES)
def test_a_message_without_an_order_has_nothing_that_looks_like_one(half: str) -> None:
    for message, answer in rows(half):
        if answer["order"] is None:
            rest = message.replace(answer["product"], "")
            assert not re.search(r"\d{3,}-|-\d{3,}|\d{5,}|[A-Z]\d{3,}|#", rest), message


@pytest.mark.parametrize("half", HALVES)
def test_no_field_in_braces_or_choice_is_left_open(half: str) -> None:
    for message, _ in rows(half):
        assert not re.search(r"[{}\[\]|]", message), message


@pytest.mark.parametrize("half", HALVES)
def test_categories_and_urgencies_are_balanced(half: str) -> None:
    kinds = Counter((answer["category"], answer["urgency"]) for _, answer in rows(half))
    assert set(kinds) == {(category, urgency) for category in CATEGORIES for urgency in ("high", "low")}
    assert max(kinds.values()) - min(kinds.values()) <= 1


def test_products_and_messages_are_not_repeated() -> None:
    answers = [answer for _, answer in rows("train")]
    assert len({answer["product"] for answer in answers}) > 0.95 * len(answers)
    assert len({message for message, _ in rows("train")}) == len(answers)
