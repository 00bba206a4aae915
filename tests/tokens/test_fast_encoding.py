"""A large store is encoded by fastokens, and is the same store without it."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastokens
import numpy as np
import pytest

from olora_ray.tokens import manifest, shard
from olora_ray.tokens.prepare import plan_here
from tests.data import small_tokenizers
from tests.tokens import helpers

LINE = "hello, there the answer is 42 Sentiment: positive\n\n two  blanks café e\u0301 😀🎉 <|im_end|> </s>"
WORDS = LINE.split(" ")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rand = random.Random(5)
    texts = [" ".join(rand.choices(WORDS, k=40)) for _ in range(1500)]
    rows = [helpers.chat(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return helpers.write_jsonl(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def made(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[bytes, list[str]]]:
    def run(kind: str, library: Any) -> tuple[bytes, list[str]]:
        """The only shard's bytes and what is said of it, made with `library` in the place of fastokens."""
        monkeypatch.setitem(sys.modules, "fastokens", library)
        # Under a name of its own, because a process loads a tokenizer once.
        spec = small_tokenizers.spec(kind, name=f"{kind} {id(library)} {tmp_path}")
        plan = plan_here(helpers.config(tmp_path / "runs", corpus, max_length=2000), spec, "train")
        found = shard.build(plan.rules(), plan.part(0))
        return shard.file_bytes(found.table()), manifest.lines(found.notes)

    return run


class Counting:
    """fastokens, which counts texts and gives another last id for `wrong_in`, and for texts longer than `right`."""

    def __init__(self, wrong_in: str | None = None, right: int = 2**30) -> None:
        self.texts, self.wrong, self.wrong_in, self.right = 0, 0, wrong_in, right
        self.Tokenizer = SimpleNamespace(from_json_str=self.load)

    def load(self, content: str) -> Any:
        self.inner = fastokens.Tokenizer.from_json_str(content)
        return SimpleNamespace(
            no_truncation=self.inner.no_truncation,
            no_padding=self.inner.no_padding,
            encode_batch_flat=self.encode,
        )

    def encode(self, texts: list[str]) -> tuple[bytes, bytes]:
        self.texts += len(texts)
        flat, borders = self.inner.encode_batch_flat(texts)
        ids = np.frombuffer(flat, np.int32).copy()
        for text, stop in zip(texts, np.frombuffer(borders, np.int64)[1:], strict=True):
            if len(text) > self.right or (self.wrong_in is not None and self.wrong_in in text):
                ids[stop - 1] = 0
                self.wrong += 1
        return ids.tobytes(), borders


@pytest.mark.parametrize("kind", sorted(small_tokenizers.KINDS))
def test_the_store_is_the_same(kind: str, made: Callable[..., tuple[bytes, list[str]]]) -> None:
    library = Counting()
    assert made(kind, library) == made(kind, None)
    byte_level = kind.startswith("byte-level")
    assert (
        library.texts > 1500
    ) == byte_level  # the others put a blank before a text, or are no BPE


@pytest.mark.parametrize("wrong_in", ["DON'T", "answer"])
def test_other_ids_do_not_come_into_the_store(
    wrong_in: str, made: Callable[..., tuple[bytes, list[str]]]
) -> None:
    library = Counting(wrong_in)
    (found, said), (expected, plain) = made("byte-level", library), made("byte-level", None)
    assert found == expected
    assert any("fastokens gave other tokens" in line for line in said) == (wrong_in == "answer")
    assert not any("fastokens" in line for line in plain)
    assert (library.wrong > 1) == (
        wrong_in == "answer"
    )  # otherwise its check on loading finds the first
