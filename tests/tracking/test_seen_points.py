"""Pairs of a metric's name and a step that were seen."""

import random

from olora_ray.tracking.write_queue import SeenPoints


def test_pairs_are_a_set() -> None:
    dice, pairs, expected = random.Random(0), SeenPoints(), set()
    for _ in range(3000):
        pair = dice.choice("ab"), dice.randrange(-1100, 1100)
        assert (pair in pairs) == (pair in expected)
        assert pairs.add(*pair) == (pair not in expected)
        expected.add(pair)
    both, other = SeenPoints(), SeenPoints()
    other.add("a", 1 << 50)
    both.update(pairs)
    both.update(other)
    assert ("a", 1 << 50) in both
    assert all(pair in both for pair in expected)
