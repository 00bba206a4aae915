"""Text to token ids, piece by piece, as inference sees them.

Where a model begins to write, its prompt has been tokenised already: no token spans the border. So a prompt and its
answer are encoded apart, each token with its place in its own piece. Two things are in the way of that and are taken
out here: post-processors that move the offsets of tokens past their leading blanks (GPT-2, Llama 3), and the blank
that SentencePiece-like tokenizers put before every text, also before one that continues another.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from olora_ray.common.errors import UserError, first_line
from olora_ray.data.formats import Rejected

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

ANCHORS = ("\n", "|", "\u2500", "0")
"""Texts that stand before a piece that continues another one; the first with which the piece does not merge is used."""


@dataclass(frozen=True)
class Piece:
    """The tokens of a piece of text."""

    ids: list[int]
    _found: "Encoding"
    """Of the piece, or of it after an anchor."""
    _anchor_ids: int = 0
    _anchor_characters: int = 0

    def starting_before(self, place: int) -> int:
        """How many tokens start before a character of the piece: its first ones, since they are in order.

        Few are asked for: a list of all places takes a tenth of the time that tokenising takes.
        """
        inside = range(self._anchor_ids, self._anchor_ids + len(self.ids))
        return bisect_left(inside, place + self._anchor_characters, key=lambda number: _start(self._found, number))


class Encoder:
    """The tokenizer of a model; no special tokens are added."""

    def __init__(self, content: str, name: str = "the model") -> None:
        """`content` is the tokenizer's JSON; raises UserError that names the model if it does not load."""
        self._tokenizer = _loaded(content, name)
        self._ahead: dict[str, Encoding] = {}
        self._ids_ahead: dict[str, Encoding] = {}
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
        return Piece(found.ids, found)

    def ids(self, text: str, continues: bool = False) -> list[int]:
        """The tokens of `encode` alone."""
        if continues and self._prefixes:
            return self.encode(text, continues).ids
        found = self._ids_ahead.get(text)
        ids: list[int] = (self._encode(text) if found is None else found).ids
        return ids

    def ahead(self, texts: Sequence[str], ids_of: Sequence[str]) -> None:
        """Encode texts together for which `encode` or `ids` will be called, one by one, until this is called again.

        What lies between two texts otherwise takes the tokenizer's tables out of the processor's cache; and without
        places, which those of `ids_of` do not have, the tokenizer takes a fifth less time.
        """
        self._ahead = self._ids_ahead = {}
        if self._prefixes:  # a text is encoded alone, or after an anchor: that is not known here
            return
        self._ahead = _together(self._tokenizer.encode_batch, texts)
        self._ids_ahead = _together(self._tokenizer.encode_batch_fast, ids_of)

    def _after(self, anchor: str, text: str) -> Piece | None:
        """The tokens of `text` after `anchor`; None if a token spans the border."""
        alone, both = self._encode(anchor).ids, self._encode(anchor + text)
        ids = both.ids[len(alone) :]
        if both.ids[: len(alone)] != alone or not ids or _start(both, len(alone)) < len(anchor):
            return None
        return Piece(ids, both, len(alone), len(anchor))

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


def _together(encode: Callable[..., "list[Encoding]"], texts: Sequence[str]) -> "dict[str, Encoding]":
    """Texts -> what a tokenizer makes of them; none where it fails: which text it is shows when it is asked for."""
    try:
        found = encode(list(texts), add_special_tokens=False)
    except BaseException as error:
        if not _is_the_tokenizers_own(error):
            raise
        return {}
    return dict(zip(texts, found, strict=True))


def _start(encoding: "Encoding", number: int) -> int:
    """The character of the text at which a token starts."""
    place = encoding.token_to_chars(number)
    assert place is not None, "no special tokens are added: each token is of the text"
    return place[0]


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
