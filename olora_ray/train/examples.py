"""A few short examples of a token store's sequences, on which a model is tried."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from olora_ray.config.evaluation import AnyConfig
from olora_ray.tokens.store import Pack

SHORT = 24
"""Tokens of an example: rounding and leaks show in a few."""

Ids = tuple[int, ...]


def three_examples(packs: Sequence[Pack], config: AnyConfig, model: Any) -> tuple[Ids, Ids, Ids]:
    """Three examples, cut; the second goes beyond the windows of a model, as far as a sequence can."""
    rows = list(examples_of(packs, SHORT))
    second = rows[1]
    if limits := _limits(model.config.get_text_config(), config.data.max_length):
        second = _as_long_as(min(config.data.max_length, max(limits) + SHORT), packs)
    return rows[0], second, rows[2]


def _as_long_as(length: int, packs: Sequence[Pack]) -> Ids:
    """The longest example, again and again to just this length: those that come first may be short, and others not."""
    ids = max(examples_of(packs, length), key=len)
    return (ids * -(-length // len(ids)))[:length]


def examples_of(packs: Sequence[Pack], longest: int) -> Iterator[Ids]:
    """The examples of some sequences, cut; the same again if they are few, so that there are three."""
    found = [tuple(ids.tolist()) for pack in packs for ids in np.split(pack.input_ids, np.cumsum(pack.segments)[:-1])]
    long = [ids[:longest] for ids in found if len(ids) > 2]
    long = long or [(3 * tuple(token for ids in found for token in ids))[:longest]]  # all together make one
    return iter([*long, *[ids[::-1] for ids in long], *long] if len(long) < 3 else long)


def _limits(shape: Any, length: int) -> list[int]:
    """What in a model's config is a window or chunk of attention shorter than a sequence."""
    named = [value for name, value in shape.to_dict().items() if "window" in name or "chunk" in name]
    return [value for value in named if type(value) is int and 0 < value < length]


def one_pack(examples: Sequence[Ids]) -> Pack:
    """A sequence in which every token but the first of an example is supervised."""
    ids = np.concatenate([np.array(example, dtype=np.int32) for example in examples])
    supervised = np.ones(len(ids), dtype=bool)
    supervised[np.cumsum([0, *map(len, examples[:-1])])] = False
    return Pack(ids, supervised, tuple(map(len, examples)))
