import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

QUICKSTART = Path(__file__).parents[2] / "pipelines" / "quickstart"
HALVES = ("train", "heldout")


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_corpus", QUICKSTART / "make_corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def rows(half: str) -> list[tuple[str, dict[str, Any]]]:
    """The message and the answer of each row."""
    lines = (QUICKSTART / f"{half}.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    return [(message, json.loads(answer)) for _, message, answer in chats]


def word_runs(half: str, length: int) -> set[tuple[str, ...]]:
    runs = set()
    for message, _ in rows(half):
        words = re.findall(r"[a-z']+", message.lower())
        runs |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return runs


@pytest.mark.parametrize("half", HALVES)
def test_the_committed_file_is_what_the_generator_writes(half: str) -> None:
    assert generator().corpus(half).encode() == (QUICKSTART / f"{half}.jsonl").read_bytes()


def test_no_five_words_in_a_row_are_shared() -> None:
    assert not word_runs("train", 5) & word_runs("heldout", 5)


@pytest.mark.parametrize("half", HALVES)
def test_product_and_order_occur_literally_in_the_message(half: str) -> None:
    for message, answer in rows(half):
        assert answer["product"] in message
        assert answer["order"] is None or answer["order"] in message
