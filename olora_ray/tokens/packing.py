"""Packing of examples into fixed-length packs: first-fit decreasing in O(n log n)."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over as few packs of `capacity` as first-fit decreasing needs.

    Returns the indices of the items in each pack, in the order in which they were put there. Equal
    lengths keep their order, so the result depends on `lengths` alone. At most 11/9 of the optimum
    + 1 packs. A length must lie in 1..capacity.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    free = _FirstFit(len(lengths), capacity)
    packs: list[list[int]] = []
    for index in by_length:
        assert 1 <= lengths[index] <= capacity, (lengths[index], capacity)
        place = free.take(lengths[index])
        if place == len(packs):
            packs.append([])
        packs[place].append(index)
    return packs


class _FirstFit:
    """The free space of each pack, with the largest of every subtree: the first fit in O(log n)."""

    def __init__(self, size: int, capacity: int) -> None:
        self._leaves = 1 << max(0, (size - 1).bit_length())
        self._free = [capacity] * (2 * self._leaves)

    def take(self, length: int) -> int:
        """Take `length` from the first pack that has it; returns the pack's number."""
        node, free = 1, self._free
        while node < self._leaves:
            node *= 2
            if free[node] < length:
                node += 1
        free[node] -= length
        place = node - self._leaves
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
        return place
