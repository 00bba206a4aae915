"""The ids of a tokenizer's tokens."""

from typing import Any

from olora_ray.common.errors import UserError

LARGEST_ID = 2**24
"""Of a token; the largest vocabularies have some hundred thousand."""


def check(backend: Any, name: str) -> None:
    """Raise UserError for an absurd id: a tokenizer as JSON takes memory for every id up to the largest."""
    token, largest = _largest(backend)
    if largest > LARGEST_ID:
        raise UserError(
            f"model.name: tokenizer.json of {name} gives the token {token[:40]!r} the id {largest}, above {LARGEST_ID}:"
            " no model has so many; put the right tokenizer.json in its folder"
        )


def has_tokens_beyond(tokenizer: Any, embeddings: int) -> bool:
    """Whether a transformers tokenizer has tokens to which no row of so many embeddings belongs."""
    return _largest(tokenizer.backend_tokenizer)[1] >= embeddings


def _largest(backend: Any) -> tuple[str, int]:
    """The token with the largest id."""
    return max(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", 0))
