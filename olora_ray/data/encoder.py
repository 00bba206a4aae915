"""Text to token ids, piece by piece, as at inference.

At inference the prompt is tokenised before the model writes, so no token spans the border. Here, too, a prompt and
its answer are encoded apart, and token offsets count from the start of a piece. Two features of tokenizers get in the
way and are removed here: post-processors that move token offsets past leading blanks (GPT-2, Llama 3), and the blank
that SentencePiece-like tokenizers put before every text, even one that continues another.

Many texts are encoded by fastokens, which gives the ids of most byte-level tokenizers several times as fast. It is
used only if it gives the tokenizer's own ids for HARD and one long text, and one text in CHECKED is encoded by both.
"""

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError, first_line
from olora_ray.data.formats.format import Rejected

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Answer = TypeVar("Answer")
Numbers = NDArray[np.int32]
_SURROGATE = re.compile("[\ud800-\udfff]")
# Texts to put before a piece that continues another one; the first with which the piece does not merge is used.
ANCHORS = ("\n", "|", "\u2500", "0")


CHECKED = 64
# Each line is a text; with them come texts with the tokenizer's added tokens, and with control characters.
HARD = """\
I'm sure they'll say it's DON'T, he'D we’ve o'clock ''ll
1 12 123 1234567890 3.14159 1,234,567.89 0x1F 1e-9 ١٢٣ ½ Ⅳ x²
   leading, inner   and trailing   \t\ttabs \t
def f(x):    return [x, *y]  # a\u00a0comment\u3000here;;;==== ---- ____ !!! ... ……
https://example.org/a_b?c=%20&d=#e me@example.org C:\\temp\\x.txt <p class="a">&nbsp;</p> {"k": [null, -1.5]}
camelCaseHTMLParser snake_case kebab-case Über STRASSEẞ naïve nai\u0308ve café cafe\u0301 ﬁn \u212b
Привет мир Γειά שלום مرحبًا नमस्ते
สวัสดี ẟ 안녕하세요 \u1112\u1161\u11ab 你好，世界。日本語のテキスト！、ＡＢＣ
😀👍\U0001f3fd👨\u200d👩\u200d👧 🇩🇪 ❤\ufe0f 𝕏 𠀀 \ue000 \u200b\u200d\ufeff\u2028\u00ad
a\u0301\u0323\u0302 \u0344 \u09c7\u09be \u1100\u1161 \ufffd\ufffe \U0010ffff
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"""


class Unlike(Exception):
    """fastokens gave other tokens than the tokenizer; it is not used again in this process."""


@dataclass(frozen=True)
class Piece:
    ids: list[int]
    _encoding: "Encoding"
    """Encoding of the piece, or of an anchor with the piece."""
    _anchor_ids: int = 0
    _anchor_characters: int = 0

    def cut(self, offset: int) -> tuple[Numbers, int]:
        """Return the ids, and how many of the tokens start before character `offset` of the piece.

        The search is by bisection, because few offsets are asked for: a list of all takes a tenth of the time of
        tokenising.
        """
        inside = range(self._anchor_ids, self._anchor_ids + len(self.ids))
        at = bisect_left(
            inside,
            offset + self._anchor_characters,
            key=lambda number: _start(self._encoding, number),
        )
        return np.array(self.ids, np.int32), at


class Encoder:
    """The tokenizer of a model; it adds no special tokens."""

    def __init__(self, content: str, name: str = "the model") -> None:
        """Load the tokenizer from its JSON text; raise a UserError that names the model if it does not load."""
        self._loaded = _loaded(content, name)
        self._tokenizer = self._loaded.tokenizer
        self._ids_ahead: dict[str, Numbers] = {}
        self._cut_ahead: dict[tuple[str, int], tuple[Numbers, int]] = {}

        @lru_cache(2**16)
        def is_blank(number: int) -> bool:
            # A broken decoder does not matter here: it only reads what a model writes.
            text, _ = _tried(self._tokenizer.decode, [number], skip_special_tokens=False)
            return text is not None and not text.strip()

        self.is_blank = is_blank
        # True if a text has other tokens at the beginning than when it continues another text.
        self._prefixes = False
        with suppress(Rejected):
            pieces = (self._after(anchor, "a") for anchor in ANCHORS)
            after = next((piece for piece in pieces if piece is not None), None)
            self._prefixes = after is not None and after.ids != self._encode("a").ids

    def id_of(self, token: str | None) -> int | None:
        if token is None:
            return None
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def token_of(self, number: int) -> str | None:
        token: str | None = self._tokenizer.id_to_token(number)
        return token

    def special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def encode(self, text: str, continues: bool = False) -> Piece:
        """Tokenise a text that begins an example, or `continues` one; raise Rejected if the tokenizer cannot."""
        if continues and self._prefixes and text:
            for anchor in ANCHORS:
                piece = self._after(anchor, text)
                if piece is not None:
                    return piece
        encoding = self._encode(text)
        return Piece(encoding.ids, encoding)

    def ids(self, text: str, continues: bool = False) -> Numbers:
        known = self._ids_ahead.get(text)
        if known is not None:
            return known
        return np.array(self.encode(text, continues).ids, np.int32)

    def cut(self, text: str, offset: int, continues: bool = False) -> tuple[Numbers, int]:
        """Return the ids of a text, and how many of its tokens start before character `offset`."""
        known = self._cut_ahead.get((text, offset))
        if known is not None:
            return known
        return self._cut(text, offset, continues)

    def _cut(self, text: str, offset: int, continues: bool = False) -> tuple[Numbers, int]:
        return self.encode(text, continues).cut(offset)

    def ahead(self, cuts: Sequence[tuple[str, int]], ids_of: Sequence[str]) -> None:
        """Encode in one batch the texts of later `cut` and `ids` calls; the next call of this drops them.

        Encoding texts one by one lets other work push the tokenizer's tables out of the CPU cache. The texts `ids_of`
        are encoded without offsets, which takes a fifth less time. Raises Unlike: then encode all again.
        """
        self._ids_ahead = {}
        self._cut_ahead = {}
        if self._prefixes:  # it is not known here whether a text will be encoded after an anchor
            return
        texts = [text for text, _ in cuts]
        if self._loaded.quick_after(sum(map(len, texts)) + sum(map(len, ids_of))):
            self._ahead_quickly(cuts, texts, ids_of)
            return
        # None if the tokenizer fails: the later call for a single text shows which text is the cause.
        pieces, _ = _tried(self._tokenizer.encode_batch, texts, add_special_tokens=False)
        self._cut_ahead = {
            cut: Piece(each.ids, each).cut(cut[1])
            for cut, each in zip(cuts, pieces or (), strict=False)
        }
        found, _ = _tried(self._tokenizer.encode_batch_fast, list(ids_of), add_special_tokens=False)
        self._ids_ahead = {
            text: np.array(each.ids, np.int32)
            for text, each in zip(ids_of, found or (), strict=False)
        }

    def _ahead_quickly(
        self, cuts: Sequence[tuple[str, int]], texts: list[str], ids_of: Sequence[str]
    ) -> None:
        starts = [text[:offset] for text, offset in cuts]
        found = _quickly(self._loaded.quick, [*ids_of, *texts, *starts])
        if found is None:
            return
        self._ids_ahead = dict(zip(ids_of, found, strict=False))
        of_cuts = found[len(ids_of) :]
        for cut, ids, start in zip(cuts, of_cuts, of_cuts[len(cuts) :], strict=False):
            # fastokens tells no offsets. Where a token spans the cut, the tokenizer itself does.
            if ids[: len(start)].tobytes() == start.tobytes():
                self._cut_ahead[cut] = ids, len(start)
        try:
            for text in ids_of[::CHECKED]:
                if self._ids_ahead[text].tolist() != self._encode(text).ids:
                    raise Unlike
            for cut in cuts[::CHECKED]:
                if cut in self._cut_ahead:
                    ids, at = self._cut_ahead[cut]
                    own, own_at = self._cut(*cut)
                    if at != own_at or not np.array_equal(ids, own):
                        raise Unlike
        except (Unlike, Rejected):
            # Rejected: the tokenizer fails on a text that fastokens has encoded.
            self._loaded.quick = None
            raise Unlike from None

    def _after(self, anchor: str, text: str) -> Piece | None:
        # None means that a token spans the border.
        alone = self._encode(anchor).ids
        both = self._encode(anchor + text)
        ids = both.ids[len(alone) :]
        if both.ids[: len(alone)] != alone or not ids or _start(both, len(alone)) < len(anchor):
            return None
        return Piece(ids, both, len(alone), len(anchor))

    def _encode(self, text: str) -> "Encoding":
        encoding, why = _tried(self._tokenizer.encode, text, add_special_tokens=False)
        if encoding is not None:
            return encoding
        if _SURROGATE.search(text):  # JSON can hold half a pair, and UTF-8 cannot
            raise Rejected("bad_text", "the text has half a surrogate pair (\\ud800 to \\udfff)")
        raise Rejected("tokenizer", f"the tokenizer fails on the text: {why}")


def _start(encoding: "Encoding", number: int) -> int:
    span = encoding.token_to_chars(number)
    assert span is not None, "no special tokens are added, so each token has a span in the text"
    return span[0]


def _tried(call: Callable[..., Answer], *arguments: Any, **named: Any) -> tuple[Answer | None, str]:
    """Return the answer of a tokenizer's code, or None and why it fails."""
    try:
        return call(*arguments, **named), ""
    except BaseException as error:
        # The Rust code raises Exception itself, or a panic, which derives from BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return None, first_line(error)


def _quickly(quick: Any, texts: Sequence[str]) -> list[Numbers] | None:
    found, _ = _tried(quick.encode_batch_flat, list(texts))
    if found is None:
        return None
    ids = np.frombuffer(found[0], np.int32)
    borders = np.frombuffer(found[1], np.int64).tolist()
    return [ids[start:stop] for start, stop in pairwise(borders)]


class _Loaded:
    def __init__(self, content: str, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.quick: Any = None
        self._content = content
        self._characters = 0

    def quick_after(self, characters: int) -> bool:
        """True if fastokens encodes the next texts, which have so many characters."""
        # To load it takes about as long as to encode as much text as the JSON is long. It is loaded after a quarter of
        # that, because mostly there is far more text, or far less.
        before = self._characters
        self._characters += characters
        if before < len(self._content) / 4 <= self._characters:
            self.quick = self._checked()
        return self.quick is not None

    def _checked(self) -> Any:
        # fastokens splits long texts and encodes the parts at once: releases of 2026 split them inside a token of
        # newlines, blanks and punctuation (crusoecloud/fastokens#59, #67).
        random = Random(0)
        count = 2**18 // 6
        signs = random.choices("\n ./\t!", k=count)
        lengths = random.choices(range(1, 12), k=count)
        long = "".join(map(str.__mul__, signs, lengths))
        texts = ["", *HARD.splitlines(), HARD, "".join(map(chr, range(0x180))), long]
        added = list(self.tokenizer.get_added_tokens_decoder().values())
        for each in added[:CHECKED]:
            token = each.content
            texts += [token, f" {token} a", f"a{token}\n{token}", f"\n\n{token}  "]

        def load() -> Any:
            from fastokens import Tokenizer

            quick = Tokenizer.from_json_str(self._content)
            quick.no_truncation()
            quick.no_padding()
            return quick

        quick, _ = _tried(load)
        own, _ = _tried(
            lambda: [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        )
        if quick is None or own is None:
            return None
        # One by one, because it refuses some that the tokenizer does not.
        for text, ids in zip(texts, own, strict=True):
            found = _quickly(quick, [text])
            if found is not None and found[0].tolist() != ids:
                return None
        return quick


@lru_cache(maxsize=4)
def _loaded(content: str, name: str) -> _Loaded:
    from tokenizers import Tokenizer

    # Each task has one core: threads of the tokenizer would only slow down the other tasks.
    os.environ.update(TOKENIZERS_PARALLELISM="false", FASTOKENS_BPE_THREADS="1")
    loaded: Any
    loaded, why = _tried(Tokenizer.from_str, content)
    if loaded is None:
        raise UserError(f"model.name: the tokenizer of {name} does not load: {why}")
    loaded.no_truncation()
    loaded.no_padding()
    loaded.post_processor = None
    return _Loaded(content, loaded)
