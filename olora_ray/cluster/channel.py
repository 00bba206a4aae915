"""Channel of a training: metrics, log lines and events from the workers to the driver, stop requests back.

A Ray actor on the driver's node; rank 0 pushes without waiting, the driver collects. Losing its messages costs
progress output, never training: every row is also in the checkpoint's history. The membership of a training whose
workers may change on the way lies in it too (cluster/membership/state.py).
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
    """A group of workers resumes from a checkpoint, or goes on as another group."""

    step: int
    total: int | None
    """Steps of the whole schedule, if they are known already."""
    workers: int
    history: list[dict[str, float]]
    """Rows of all steps up to here."""
    why: str = ""
    """What has changed the group, if its workers know."""


@dataclass(frozen=True)
class Started:
    """A group of workers starts a run."""

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


@dataclass(frozen=True)
class Took:
    """What the start of a worker, the last evaluation and the answers before training took."""

    seconds: dict[str, float]
    """By `start`, `evaluation` and `answers`."""


Message = dict[str, float] | str | Resumed | Started | Failure | Saved | Took
"""A row of metrics with its `step`, a line for the log, or an event."""


@ray.remote(num_cpus=0)
class DriverChannel(Membership):
    """Buffers worker messages for the driver, and has the membership. Async: hundreds of calls may wait in it."""

    def __init__(self) -> None:
        super().__init__(1, lambda member: ray_internals.actor_died(member.name))
        self._messages: list[Message] = []
        self._reason: str | None = None
        self._stop_requested = asyncio.Event()
        self._data_failed = False
        self._result: Any = None
        self._step_done = asyncio.Event()

    async def send(self, message: Message) -> None:
        """Add a message."""
        self._messages.append(message)
        if isinstance(message, dict) and "train/loss" in message:
            self._start_waiting()

    async def drain(self) -> list[Message]:
        """Return all messages since the last call, in order."""
        taken, self._messages = self._messages, []
        return taken

    async def request_stop(self, why: str | None) -> None:
        """Ask the workers to write a checkpoint after the step they are at, and to end; None: continue."""
        self._reason = why
        if why is None:
            self._stop_requested.clear()
        else:
            self._stop_requested.set()

    async def wait_for_stop(self) -> str | None:
        """Wait until the workers should end; returns why."""
        await self._stop_requested.wait()
        return self._reason

    async def report_data_failure(self) -> None:
        """Tell workers that wait for data that none will come."""
        self._data_failed = True

    async def data_failed(self) -> bool:
        """True if no more data will come."""
        return self._data_failed

    async def begin_anew(self, wanted: int, attempt: int) -> None:
        """See Membership; a result of an earlier attempt is forgotten, too."""
        self._result = None
        await super().begin_anew(wanted, attempt)

    async def moment_to_start(self) -> bool:
        """Wait until a worker may start: at once if it is needed, else when those that train have done a step.

        False if the training has ended. Waits for a minute at most.
        """
        step, end = self._step_done, time.monotonic() + 60
        while not step.is_set() and time.monotonic() < end and await self.complete():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(step.wait(), 0.5)
        return self._result is None

    def _start_waiting(self) -> None:
        """Let those start that wait for a step."""
        self._step_done.set()
        self._step_done = asyncio.Event()

    async def finish(self, result: Any) -> None:
        """Take what training gave; every worker gives it, with the same result, since any of them may die."""
        self._result = self._result or result
        self._start_waiting()
        await self.close()

    async def result(self) -> Any:
        """Return what training gave; None while it has not ended."""
        return self._result


def make_channel(node: str) -> Any:
    """Start a channel on the node with this id, the driver's: it must not die with a host of workers."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Ray takes a soft wish lightly: on a head without CPUs every second channel was put on another host.
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    kind: Any = DriverChannel
    # Of each worker two calls wait in it, so there may be thousands at a time.
    return kind.options(scheduling_strategy=strategy, max_concurrency=20_000).remote()


_sender: ContextVar["_Sender | None"] = ContextVar("sender", default=None)


class _Sender(logging.Handler):
    """Sends the log lines of one training over its channel; several trainings may share a process."""

    def __init__(self, channel: Any, speaks: Callable[[], bool]) -> None:
        super().__init__()
        self.channel, self.speaks = channel, speaks

    def emit(self, record: logging.LogRecord) -> None:
        if _sender.get() is self and self.speaks():
            self.channel.send.remote(logs.line(record))


@contextlib.contextmanager
def sent_to(channel: Any, speaks: Callable[[], bool]) -> Iterator[None]:
    """Let what is logged in this context go to the driver, while `speaks()`: on the first worker only."""
    handler = _Sender(channel, speaks)
    token = _sender.set(handler)
    try:
        with logs.handled_by(handler):
            yield
    finally:
        _sender.reset(token)
