"""Pseudo-random numbers as functions of a key and a counter: the same with every machine, numpy and Ray.

Orders made here are part of what a run can be repeated by, so they do not lean on numpy's generators,
whose streams may change between releases.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Indices = NDArray[np.int64]

ROUNDS = 8
"""Rounds of the Feistel network; four make a pseudo-random permutation, the rest costs nothing."""


def key(*parts: object) -> int:
    """A 64-bit key from anything that has a stable `str`."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "little")


def mix(seed: int, counters: Words) -> Words:
    """One uniform 64-bit word for each counter (splitmix64)."""
    word = (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def permutation(size: int, seed: int) -> Indices:
    """A permutation of range(size) that depends on the seed alone."""
    return np.argsort(mix(seed, np.arange(size, dtype=np.uint64)), kind="stable").astype(np.int64)


def bernoulli_mask(share: float, seed: int, counters: Indices) -> NDArray[np.bool_]:
    """Mask of the counters that fall into a random `share` of all; depends on each counter and the seed alone."""
    return mix(seed, counters.astype(np.uint64)) < np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def permute_at(places: Indices, size: int, seed: int) -> Indices:
    """The elements of a permutation of range(size) at `places`, without making the whole permutation.

    A Feistel network permutes the next power of four; what falls outside the range walks on until
    it is inside, which keeps it a permutation of the range.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    result = _feistel(places.astype(np.uint64), half, seed)
    while (outside := result >= np.uint64(size)).any():
        result[outside] = _feistel(result[outside], half, seed)
    return result.astype(np.int64)


def _feistel(words: Words, half: np.uint64, seed: int) -> Words:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = words >> half, words & mask
    for turn in range(ROUNDS):
        left, right = right, left ^ (mix(key(seed, turn), right) & mask)
    return (left << half) | right
