"""What the workers tell the driver while they train: rows of metrics and lines of text.

A Ray actor on the driver's node; rank 0 pushes without waiting, the driver collects. Losing it costs
progress output, never training: every row is also in the checkpoint's history.
"""

from typing import Any

import ray


@ray.remote(num_cpus=0)
class Board:
    """Holds messages until the driver collects them."""

    def __init__(self) -> None:
        self._messages: list[dict[str, float] | str] = []

    def put(self, message: dict[str, float] | str) -> None:
        """Add a row of metrics with its `step`, or a line for the log."""
        self._messages.append(message)

    def take(self) -> list[dict[str, float] | str]:
        """Everything since the last call, in order."""
        taken, self._messages = self._messages, []
        return taken


def make(node: str) -> Any:
    """A board pinned to the node with this id."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=True)
    return Board.options(scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]
