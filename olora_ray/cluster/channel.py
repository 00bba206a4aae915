"""Channel of a training: metrics, log lines and signs of life from the workers to the driver, and stop requests back.

The channel is a Ray actor on the driver's node. Rank 0 sends without waiting, and the driver collects. A lost message
costs only progress output, because every row of metrics is also in the checkpoint's history.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import ray

from olora_ray.common import logs


@dataclass(frozen=True)
class Started:
    """A group of workers trains."""

    workers: int
    resumed_from: int | None = None
    """Step of the checkpoint; None if the training begins."""
    history: Sequence[dict[str, float]] = ()
    """Rows of metrics up to this step."""


@dataclass(frozen=True)
class Saved:
    step: int
    seconds: float


Message = dict[str, float] | str | Started | Saved
"""A row of metrics with its `step`, a line for the log, or an event."""


@dataclass(frozen=True)
class Member:
    """A worker of Ray Train, as its signs of life name it."""

    rank: int
    node: str
    process: int
    actor: str


@ray.remote(num_cpus=0)
class DriverChannel:
    """Buffer of the workers' messages to the driver.

    Its methods are async because hundreds of calls may wait in it.
    """

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._reason: str | None = None
        self._stop_requested = asyncio.Event()
        self._result: Any = None
        self._seen: dict[Member, float] = {}
        self._former: set[Member] = set()

    async def send(self, message: Message) -> None:
        self._messages.append(message)

    async def drain(self) -> list[Message]:
        """Return all messages since the last call, in order."""
        taken = self._messages
        self._messages = []
        return taken

    async def begin(self) -> None:
        """Forget the previous group of workers: its result, its members and the request to stop it."""
        self._result = self._reason = None
        self._stop_requested.clear()
        self._former |= self._seen.keys()
        self._seen = {}

    async def request_stop(self, why: str) -> None:
        """Ask the workers to write a checkpoint after the current step and to end."""
        self._reason = why
        self._stop_requested.set()

    async def wait_for_stop(self) -> str | None:
        await self._stop_requested.wait()
        return self._reason

    async def alive(self, member: Member) -> None:
        if member not in self._former:
            self._seen[member] = time.monotonic()

    async def members(self, silence: float) -> tuple[list[Member], list[Member]]:
        """Return the workers of the group, and those among them that gave no sign of life for `silence` seconds."""
        # After a pause of this machine all signs are late, so look again when they had time to arrive.
        if self._silent(silence):
            await asyncio.sleep(2.0)
        return list(self._seen), self._silent(silence)

    def _silent(self, silence: float) -> list[Member]:
        return [member for member, seen in self._seen.items() if time.monotonic() - seen > silence]

    async def finish(self, result: Any) -> None:
        self._result = self._result or result

    async def result(self) -> Any:
        return self._result


def give_signs_of_life(channel: Any, rank: int) -> None:
    """Let the driver know, until this process ends, that it runs."""
    context = ray.get_runtime_context()
    member = Member(rank, context.get_node_id(), os.getpid(), context.get_actor_id() or "")

    def give() -> None:
        while True:
            channel.alive.remote(member)
            time.sleep(1.0)

    threading.Thread(target=give, name="signs of life", daemon=True).start()


def make_channel() -> Any:
    """Return a channel on the node of this process."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Not soft: Ray put every second channel on another node than the head when the head had no CPUs.
    node = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    actor_class: Any = DriverChannel
    # A call of each group waits in it (`wait_for_stop`), and each worker calls it once a second.
    return actor_class.options(scheduling_strategy=strategy, max_concurrency=1000).remote()


_sender: ContextVar["_Sender | None"] = ContextVar("sender", default=None)


class _Sender(logging.Handler):
    def __init__(self, channel: Any, speaks: Callable[[], bool]) -> None:
        super().__init__()
        self.channel = channel
        self.speaks = speaks

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
