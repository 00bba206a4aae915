"""What the workers tell the driver while they train, and what the driver asks of them.

A Ray actor on the driver's node; rank 0 pushes without waiting, the driver collects. Losing it costs
progress output, never training: every row is also in the checkpoint's history.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True)
class Resumed:
    """A group of workers goes on from a checkpoint."""

    step: int
    total: int | None
    """Steps of the whole schedule, if they are known already."""
    workers: int
    history: list[dict[str, float]]
    """Rows of all steps up to here."""


@dataclass(frozen=True)
class Started:
    """A group of workers begins at the start."""

    workers: int


@dataclass(frozen=True)
class Failure:
    """Workers have failed; Ray starts them again or gives up."""

    what: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint is written."""

    step: int
    seconds: float


Message = dict[str, float] | str | Resumed | Started | Failure | Saved
"""A row of metrics with its `step`, a line for the log, or an event."""


@ray.remote(num_cpus=0)
class Board:
    """Holds messages until the driver collects them; asynchronous, so that a call may wait for a wish."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._wish: str | None = None
        self._wished = asyncio.Event()
        self._hopeless = False

    async def put(self, message: Message) -> None:
        """Add a message."""
        self._messages.append(message)

    async def take(self) -> list[Message]:
        """Everything since the last call, in order."""
        taken, self._messages = self._messages, []
        return taken

    async def stop(self, why: str | None) -> None:
        """Ask the workers to write a checkpoint after the step they are at, and to end; None: go on."""
        self._wish = why
        if why is None:
            self._wished.clear()
        else:
            self._wished.set()

    async def wish(self) -> str | None:
        """Why the workers should end; waits until they should."""
        await self._wished.wait()
        return self._wish

    async def give_up_waiting(self) -> None:
        """Tell workers that wait for data that none will come."""
        self._hopeless = True

    async def hopeless(self) -> bool:
        """Whether no more data will come."""
        return self._hopeless


def make(node: str) -> Any:
    """A board pinned to the node with this id."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=True)
    return Board.options(scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]
