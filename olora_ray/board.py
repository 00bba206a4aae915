"""What the workers tell the driver while they train: rows of metrics and lines of text.

A Ray actor on the driver's node; rank 0 pushes without waiting, the driver collects. Losing it costs
progress output, never training: every row is also in the checkpoint's history.
"""

from collections.abc import Iterable
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Board:
    """Holds messages until the driver collects them."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._lines: list[str] = []

    def push(self, row: dict[str, float]) -> None:
        """Add a row of metrics with its `step`."""
        self._rows.append(row)

    def say(self, line: str) -> None:
        """Add a line for the log."""
        self._lines.append(line)

    def take(self) -> tuple[list[dict[str, float]], list[str]]:
        """All rows and lines since the last call."""
        taken = self._rows, self._lines
        self._rows, self._lines = [], []
        return taken


def make(node: str) -> Any:
    """A board pinned to the node with this id."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=True)
    return Board.options(scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]


def push_all(board: Any, rows: Iterable[dict[str, float]]) -> None:
    """Push rows without waiting for the board."""
    for row in rows:
        board.push.remote(row)
