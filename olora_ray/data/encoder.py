"""Text to token ids, piece by piece, as inference sees them.

Where a model begins to write, its prompt has been tokenised already: no token spans the border. So a prompt and its
answer are encoded apart, each token with its place in its own piece. Two things are in the way of that and are taken
out here: post-processors that move the offsets of tokens past their leading blanks (GPT-2, Llama 3), and the blank
that SentencePiece-like tokenizers put before every text, also before one that continues another.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError, first_line
from olora_ray.data.example import Rejected

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

ANCHORS = ("\n", "|", "\u2500", "0")
"""Texts that stand before a piece that continues another one; the first with which the piece does not merge is used."""


@dataclass(frozen=True)
class Piece:
    """The tokens of a piece of text."""

    ids: list[int]
    starts: NDArray[np.int64]
    """The character of the piece at which each token starts."""


class Encoder:
    """The tokenizer of a model; no special tokens are added."""

    def __init__(self, content: str, name: str = "the model") -> None:
        """`content` is the tokenizer's JSON; raises UserError that names the model if it does not load."""
        self._tokenizer = _loaded(content, name)
        self._ahead: dict[str, Encoding] = {}
        self._prefixes = self._puts_a_blank()

    def id_of(self, token: str | None) -> int | None:
        """The id of a token; None if there is none."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def token_of(self, number: int) -> str | None:
        """The token of an id; None if there is none."""
        token: str | None = self._tokenizer.id_to_token(number)
        return token

    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens: those that a decoder leaves out."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def is_blank(self, number: int) -> bool:
        """Whether a token stands for blanks or line breaks alone."""
        try:
            text: str = self._tokenizer.decode([number], skip_special_tokens=False)
        except BaseException as error:
            if not _is_the_tokenizers_own(error):
                raise
            return False  # a broken decoder is no matter of training: it only reads what a model writes
        return not text.strip()

    def encode(self, text: str, continues: bool = False) -> Piece:
        """The tokens of a text that starts anew, or continues another; raises Rejected for what has none."""
        if continues and self._prefixes and text:
            for anchor in ANCHORS:
                if (piece := self._after(anchor, text)) is not None:
                    return piece
        found = self._encode(text)
        return Piece(found.ids, _starts(found))

    def ids(self, text: str, continues: bool = False) -> list[int]:
        """The tokens of `encode` without their places, which take a part of the time that tokenising takes."""
        if continues and self._prefixes:
            return self.encode(text, continues).ids
        ids: list[int] = self._encode(text).ids
        return ids

    def ahead(self, texts: Sequence[str]) -> None:
        """Encode texts together that will be asked for, one after the other, until this is called again.

        What lies between two texts otherwise takes the tokenizer's tables out of the processor's cache.
        """
        self._ahead = {}
        if self._prefixes:  # a text is encoded alone, or after an anchor: that is not known here
            return
        try:
            found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        except BaseException as error:  # which text it is shows when it is asked for
            if not _is_the_tokenizers_own(error):
                raise
            return
        self._ahead = dict(zip(texts, found, strict=True))

    def _after(self, anchor: str, text: str) -> Piece | None:
        """The tokens of `text` after `anchor`; None if a token spans the border."""
        alone, both = self._encode(anchor).ids, self._encode(anchor + text)
        starts = _starts(both)[len(alone) :] - len(anchor)
        if both.ids[: len(alone)] != alone or not len(starts) or starts.min() < 0:
            return None
        return Piece(both.ids[len(alone) :], starts)

    def _puts_a_blank(self) -> bool:
        """Whether a text that starts anew has other tokens than one that continues another."""
        try:
            found = (self._after(anchor, "a") for anchor in ANCHORS)
            after = next((piece for piece in found if piece is not None), None)
            return after is not None and after.ids != self._encode("a").ids
        except Rejected:
            return False

    def _encode(self, text: str) -> "Encoding":
        if (found := self._ahead.get(text)) is not None:
            return found
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # half a surrogate pair, which JSON can hold and UTF-8 cannot
            raise Rejected("bad_text", "the text has half a surrogate pair (\\ud800 to \\udfff)") from None
        except BaseException as error:
            if not _is_the_tokenizers_own(error):
                raise
            raise Rejected("tokenizer", f"the tokenizer fails on the text: {first_line(error)}") from None


def _starts(encoding: "Encoding") -> NDArray[np.int64]:
    return np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0]


def _is_the_tokenizers_own(error: BaseException) -> bool:
    """Errors of the Rust code: Exception itself, or a panic, which derives from BaseException."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@lru_cache(maxsize=4)
def _loaded(content: str, name: str) -> "Tokenizer":
    """A tokenizer, loaded once in a process."""
    from tokenizers import Tokenizer

    # A task has its own core; threads of its own would only get in the way of the other tasks.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        loaded: Any = Tokenizer.from_str(content)
    except BaseException as error:
        if not _is_the_tokenizers_own(error):
            raise
        raise UserError(f"model.name: the tokenizer of {name} does not load: {first_line(error)}") from None
    loaded.no_truncation()
    loaded.no_padding()
    loaded.post_processor = None
    return loaded  # type: ignore[no-any-return]
