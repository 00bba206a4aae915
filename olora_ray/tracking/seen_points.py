"""Which steps of which metrics have been seen, in little memory."""

_BLOCK = 1024


class SeenPoints:
    """A set of (name, step): one bit per pair, in blocks of 1024 steps."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, int], int] = {}

    def add(self, name: str, step: int) -> bool:
        """Add a pair; False if it is there already."""
        block, bit = (name, step // _BLOCK), 1 << (step % _BLOCK)
        there = self._blocks.get(block, 0)
        self._blocks[block] = there | bit
        return not there & bit

    def __contains__(self, pair: tuple[str, int]) -> bool:
        name, step = pair
        return bool(self._blocks.get((name, step // _BLOCK), 0) >> (step % _BLOCK) & 1)

    def update(self, other: "SeenPoints") -> None:
        """Add all pairs of `other`."""
        for block, bits in other._blocks.items():
            self._blocks[block] = self._blocks.get(block, 0) | bits
