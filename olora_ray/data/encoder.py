"""Text to token ids, piece by piece, as at inference.

At inference the prompt is tokenised before the model writes, so no token spans the border. Here, too, a prompt and
its answer are encoded apart, and token offsets count from the start of a piece. Two features of tokenizers get in the
way and are removed here: post-processors that move token offsets past leading blanks (GPT-2, Llama 3), and the blank
that SentencePiece-like tokenizers put before every text, even one that continues another.
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

# Texts to put before a piece that continues another one; the first with which the piece does not merge is used.
ANCHORS = ("\n", "|", "\u2500", "0")


@dataclass(frozen=True)
class Piece:
    ids: list[int]
    # Encoding of the piece, or of an anchor with the piece.
    _encoding: "Encoding"
    _anchor_ids: int = 0
    _anchor_characters: int = 0

    def starting_before(self, offset: int) -> int:
        """Return how many tokens start before character `offset` of the piece.

        The search is by bisection, because few offsets are asked for: a list of all takes a tenth of the time of
        tokenising.
        """
        inside = range(self._anchor_ids, self._anchor_ids + len(self.ids))
        return bisect_left(inside, offset + self._anchor_characters, key=lambda number: _start(self._encoding, number))


class Encoder:
    """The tokenizer of a model; it adds no special tokens."""

    def __init__(self, content: str, name: str = "the model") -> None:
        """Load the tokenizer from its JSON text; raise a UserError that names the model if it does not load."""
        self._tokenizer = _loaded(content, name)
        self._ahead: dict[str, Encoding] = {}
        self._ids_ahead: dict[str, Encoding] = {}
        self._prefixes = self._puts_a_blank()

    def id_of(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def token_of(self, number: int) -> str | None:
        token: str | None = self._tokenizer.id_to_token(number)
        return token

    def special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def is_blank(self, number: int) -> bool:
        try:
            text: str = self._tokenizer.decode([number], skip_special_tokens=False)
        except BaseException as error:
            if not _is_the_tokenizers_own(error):
                raise
            return False  # a broken decoder does not matter here: it only reads what a model writes
        return not text.strip()

    def encode(self, text: str, continues: bool = False) -> Piece:
        """Tokenise a text that begins an example, or `continues` one; raise Rejected if the tokenizer cannot."""
        if continues and self._prefixes and text:
            for anchor in ANCHORS:
                if (piece := self._after(anchor, text)) is not None:
                    return piece
        encoding = self._encode(text)
        return Piece(encoding.ids, encoding)

    def ids(self, text: str, continues: bool = False) -> list[int]:
        if continues and self._prefixes:
            return self.encode(text, continues).ids
        encoding = self._ids_ahead.get(text)
        ids: list[int] = (self._encode(text) if encoding is None else encoding).ids
        return ids

    def ahead(self, texts: Sequence[str], ids_of: Sequence[str]) -> None:
        """Encode in one batch the texts of later `encode` and `ids` calls; the next call of this drops them.

        Encoding texts one by one lets other work push the tokenizer's tables out of the CPU cache. The texts `ids_of`
        are encoded without offsets, which takes a fifth less time.
        """
        self._ahead = self._ids_ahead = {}
        if self._prefixes:  # it is not known here whether a text will be encoded after an anchor
            return
        self._ahead = _together(self._tokenizer.encode_batch, texts)
        self._ids_ahead = _together(self._tokenizer.encode_batch_fast, ids_of)

    def _after(self, anchor: str, text: str) -> Piece | None:
        # None means that a token spans the border.
        alone, both = self._encode(anchor).ids, self._encode(anchor + text)
        ids = both.ids[len(alone) :]
        if both.ids[: len(alone)] != alone or not ids or _start(both, len(alone)) < len(anchor):
            return None
        return Piece(ids, both, len(alone), len(anchor))

    def _puts_a_blank(self) -> bool:
        """True if a text has other tokens at the beginning than when it continues another text."""
        try:
            pieces = (self._after(anchor, "a") for anchor in ANCHORS)
            after = next((piece for piece in pieces if piece is not None), None)
            return after is not None and after.ids != self._encode("a").ids
        except Rejected:
            return False

    def _encode(self, text: str) -> "Encoding":
        if (encoding := self._ahead.get(text)) is not None:
            return encoding
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # half a surrogate pair, which JSON can hold and UTF-8 cannot
            raise Rejected("bad_text", "the text has half a surrogate pair (\\ud800 to \\udfff)") from None
        except BaseException as error:
            if not _is_the_tokenizers_own(error):
                raise
            raise Rejected("tokenizer", f"the tokenizer fails on the text: {first_line(error)}") from None


def _together(encode: Callable[..., "list[Encoding]"], texts: Sequence[str]) -> "dict[str, Encoding]":
    # Empty if the tokenizer fails: the later call for a single text shows which text is the cause.
    try:
        encodings = encode(list(texts), add_special_tokens=False)
    except BaseException as error:
        if not _is_the_tokenizers_own(error):
            raise
        return {}
    return dict(zip(texts, encodings, strict=True))


def _start(encoding: "Encoding", number: int) -> int:
    span = encoding.token_to_chars(number)
    assert span is not None, "no special tokens are added, so each token has a span in the text"
    return span[0]


def _is_the_tokenizers_own(error: BaseException) -> bool:
    # The Rust code raises Exception itself, or a panic, which derives from BaseException.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@lru_cache(maxsize=4)
def _loaded(content: str, name: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    # Each task has one core: threads of the tokenizer would only slow down the other tasks.
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
