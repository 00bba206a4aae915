"""Channel of a training: metrics, log lines and events from the workers to the driver, and stop requests back.

The channel is a Ray actor on the driver's node. Rank 0 sends without waiting, and the driver collects. A lost message
costs only progress output, because every row of metrics is also in the checkpoint's history. The actor also holds the
membership of a training whose workers may join and leave (cluster/membership/state.py).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import ray

from olora_ray.cluster import ray_internals
from olora_ray.cluster.membership.state import Membership
from olora_ray.common import logs


@dataclass(frozen=True)
class Resumed:
    """A group of workers resumes from a checkpoint, or continues after a change of the group."""

    step: int
    total: int | None
    """Steps of the complete schedule, if already known."""
    workers: int
    history: list[dict[str, float]]
    """Rows of metrics up to this step."""
    why: str = ""
    """Why the group has changed, if its workers know."""


@dataclass(frozen=True)
class Started:
    workers: int


@dataclass(frozen=True)
class Failure:
    what: str


@dataclass(frozen=True)
class Saved:
    step: int
    seconds: float


@dataclass(frozen=True)
class Took:
    """Durations, from which the driver estimates the remaining time."""

    seconds: dict[str, float]
    """Seconds by `start` (of a worker), `evaluation` (the last one) and `answers` (before training)."""


Message = dict[str, float] | str | Resumed | Started | Failure | Saved | Took
"""A row of metrics with its `step`, a line for the log, or an event."""


@ray.remote(num_cpus=0)
class DriverChannel(Membership):
    """Buffer of the workers' messages to the driver, and their membership.

    Its methods are async because hundreds of calls may wait in it.
    """

    def __init__(self) -> None:
        super().__init__(1, lambda member: ray_internals.actor_died(member.name))
        self._messages: list[Message] = []
        self._reason: str | None = None
        self._stop_requested = asyncio.Event()
        self._data_failed = False
        self._result: Any = None
        self._step_done = asyncio.Event()

    async def send(self, message: Message) -> None:
        self._messages.append(message)
        if isinstance(message, dict) and "train/loss" in message:
            self._start_waiting()

    async def drain(self) -> list[Message]:
        """Return all messages since the last call, in order."""
        taken, self._messages = self._messages, []
        return taken

    async def request_stop(self, why: str | None) -> None:
        """Ask the workers to write a checkpoint after the current step and to end. `why=None` withdraws the request."""
        self._reason = why
        if why is None:
            self._stop_requested.clear()
        else:
            self._stop_requested.set()

    async def wait_for_stop(self) -> str | None:
        await self._stop_requested.wait()
        return self._reason

    async def report_data_failure(self) -> None:
        self._data_failed = True

    async def data_failed(self) -> bool:
        return self._data_failed

    async def begin_anew(self, wanted: int, attempt: int) -> None:
        self._result = None  # of the previous attempt
        await super().begin_anew(wanted, attempt)

    async def moment_to_start(self) -> bool:
        """Wait until a worker may start: at once if it is needed, otherwise after the group's next step.

        Waits for up to a minute. Returns False if the training has ended.
        """
        step, end = self._step_done, time.monotonic() + 60
        while not step.is_set() and time.monotonic() < end and await self.complete():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(step.wait(), 0.5)
        return self._result is None

    def _start_waiting(self) -> None:
        self._step_done.set()
        self._step_done = asyncio.Event()

    async def finish(self, result: Any) -> None:
        # Every worker sends the same result, because any of them may die.
        self._result = self._result or result
        self._start_waiting()
        await self.close()

    async def result(self) -> Any:
        return self._result


def make_channel(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Not soft: Ray put every second channel on another node than the head when the head had no CPUs.
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    actor_class: Any = DriverChannel
    # Two calls of each worker wait in it, `beat` and `wait_for_stop`, so thousands may wait at a time.
    return actor_class.options(scheduling_strategy=strategy, max_concurrency=20_000).remote()


_sender: ContextVar["_Sender | None"] = ContextVar("sender", default=None)


class _Sender(logging.Handler):
    def __init__(self, channel: Any, speaks: Callable[[], bool]) -> None:
        super().__init__()
        self.channel, self.speaks = channel, speaks

    def emit(self, record: logging.LogRecord) -> None:
        if _sender.get() is self and self.speaks():
            self.channel.send.remote(logs.line(record))


@contextlib.contextmanager
def sent_to(channel: Any, speaks: Callable[[], bool]) -> Iterator[None]:
    """Send the lines logged in this context to the driver whenever `speaks()` is true, which it is only on rank 0."""
    handler = _Sender(channel, speaks)
    token = _sender.set(handler)
    try:
        with logs.handled_by(handler):
            yield
    finally:
        _sender.reset(token)
