"""The driver's connection to Ray: connect, check that the run fits the cluster, handle signals, disconnect."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import ray

from olora_ray.cluster import address, preflight, ray_internals
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.common.errors import Stopped, TakenOver
from olora_ray.config.schema import AnyConfig

logger = logging.getLogger(__name__)

# SIGTERM and Ctrl+C: during training a request to stop after the current step, otherwise an immediate end.


CTRL_C = "Ctrl+C"


def _name(number: int) -> str:
    if number == signal.SIGINT:
        return CTRL_C
    return signal.Signals(number).name


class Stop:
    """Handler of both signals in the main thread, while its context is entered."""

    def __init__(self) -> None:
        self.asked: str | None = None
        """Name of the signal that arrived while `gentle` was True: SIGTERM or Ctrl+C."""
        self.gentle = False
        """True while the training polls `asked`. A second Ctrl+C still ends the run at once."""
        self._raised: Stopped | None = None
        self._lost: TakenOver | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Stop":
        self._before = self.listen()
        return self

    def listen(self) -> dict[signal.Signals, object]:
        """Install the handler; return those that it replaces."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        return {number: signal.signal(number, self._caught) for number in numbers}

    def __exit__(self, error_type: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._raised and isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped):
            raise self._raised from None  # ray.get replaces our exception by its own KeyboardInterrupt
        # The handler that ray.init installs exits with the number of the signal.
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            raise _at_once(signal.SIGTERM) from None

    def abandon(self, error: TakenOver) -> None:
        """Raise `error` in the main thread, even while that waits; call this from another thread."""
        self._lost = error
        # Only a real signal to the main thread interrupts a system call in which it waits.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def stopped(self, where: str) -> Stopped:
        number = signal.SIGINT if self.asked == CTRL_C else signal.SIGTERM
        return Stopped(
            f"{where} ({_name(number)}); run the same command again to resume", 128 + number
        )

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self._lost:
            self._raised = self._lost
            raise self._lost
        name = _name(number)
        # `ray job stop` signals all processes of a job, and deploy/night.py forwards its signal, so the driver gets two
        # SIGTERM. The second one must not end the run before its checkpoint.
        if self.gentle and (self.asked is None or name == "SIGTERM"):
            self.asked = self.asked or name
            return
        # Ray takes seconds to end. Not a log line: a handler must not wait for a lock that its own thread holds.
        os.write(2, f"{name}: stopping at once\n".encode())
        self._raised = _at_once(number)
        raise self._raised


def _at_once(number: int) -> Stopped:
    return Stopped(f"stopped ({_name(number)}); run the same command again to resume", 128 + number)


@contextlib.contextmanager
def connect(config: AnyConfig, trains: bool = False) -> Iterator[tuple[Stop, ClusterFacts]]:
    """Connect to the Ray cluster that `address.find` returns, or start a local one.

    Yields the handler of signals, and the facts of the cluster, which is asked once. `trains`: the workers of a
    training follow. Raises UserError if the cluster does not answer. Leaving the context disconnects, and stops a
    local cluster.
    """
    ray_internals.quiet_ray()
    with Stop() as stop:
        own = address.join_or_start()
        stop.listen()  # ray.init has installed its own handlers
        if own and trains:
            # This only saves time: Ray Train starts the coordinator if it is missing.
            with contextlib.suppress(Exception):
                ray_internals.begin_autoscaling_coordinator()
        try:
            resources = ray.cluster_resources()
            logger.info(
                f"ray: {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, {len(ray.nodes())} node(s)"
            )
            yield stop, preflight.ask(config)
        finally:
            ray.shutdown()
