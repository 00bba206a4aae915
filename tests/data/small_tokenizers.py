"""Specs of small trained tokenizers, of the types that models have."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from olora_ray.data.tokenizer_spec import TokenizerSpec
from tests.tokens.helpers import CHATML, SPECIAL

CORPUS = [
    "Sentiment: positive\n\nSentiment: negative",
    "Answer: the answer is 42.\n\nhello world, hello there",
    "\n\nuser\n  two blanks   three. e\u0301te\u0301 a\u0308 cafe 😀🎉👍🏽 1234567890",
] * 20


def byte_level(trim_offsets: bool, normalizer: Any = None) -> Tokenizer:
    """Like GPT-2 and Llama 3 (offsets without leading blanks), or Qwen and SmolLM2 (unchanged offsets)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        tokenizer,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False),
    )


def metaspace(scheme: str) -> Tokenizer:
    """Like recent SentencePiece-like tokenizers."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=200, show_progress=False))


def prepend() -> Tokenizer:
    """Like Llama 2: the normalizer puts the blank before a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=200, show_progress=False))


def unigram() -> Tokenizer:
    """Like the SentencePiece of T5 and ALBERT."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(
        tokenizer, trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", show_progress=False)
    )


def _trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    trainer.special_tokens = [AddedToken(token, special=True) for token in SPECIAL]
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(False),
    "byte-level-trimmed": lambda: byte_level(True),
    "byte-level-nfc": lambda: byte_level(False, normalizers.NFC()),
    "metaspace-always": lambda: metaspace("always"),
    "metaspace-first": lambda: metaspace("first"),
    "prepend": prepend,
    "unigram": unigram,
}


@lru_cache
def tokenizer(kind: str) -> Tokenizer:
    return KINDS[kind]()


def spec(kind: str, **changes: Any) -> TokenizerSpec:
    """The spec of a tokenizer of KINDS, in ChatML."""
    inner = tokenizer(kind)
    settings: dict[str, Any] = {
        "json": inner.to_str(),
        "chat_template": CHATML,
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "eos_id": inner.token_to_id("</s>"),
        "bos_id": inner.token_to_id("<s>"),
        "add_bos": False,
        "name": kind,
    }
    return TokenizerSpec(**{**settings, **changes})
