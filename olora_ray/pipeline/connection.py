"""Connection of a driver to Ray: connects, checks that the run can work there, and disconnects."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError

from olora_ray.cluster import address, preflight, ray_internals
from olora_ray.common.errors import (
    Stopped,
    TakenOver,
    UserError,
)
from olora_ray.common.logs import ENVIRONMENT
from olora_ray.config.schema import AnyConfig
from olora_ray.model.source import BaseModel

logger = logging.getLogger(__name__)

# SIGTERM and Ctrl+C: a request to stop after the next step while training, an immediate end elsewhere.


class Stop:
    """Takes both signals in the main thread for as long as it is entered."""

    def __init__(self) -> None:
        self.asked: str | None = None
        """Name of the signal that came while `gentle`."""
        self.gentle = False
        """True while `asked` is polled. A second Ctrl+C ends the run at once all the same."""
        self._raised: Stopped | None = None
        self._lost: TakenOver | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._raised and isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped):
            raise self._raised from None  # ray.get passes on a KeyboardInterrupt of its own

    def abandon(self, error: TakenOver) -> None:
        """Raise `error` in the main thread at once, also while it waits; called from another thread."""
        self._lost = error
        # A real signal, and to that thread: nothing else ends its waiting.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def stopped(self, where: str) -> Stopped:
        """The exception to raise once the request was granted."""
        name = self.asked or "SIGTERM"
        return Stopped(f"{where} ({name}); the same command continues from there", 128 + signal.Signals[name].value)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self._lost:
            self._raised = self._lost
            raise self._lost
        name = signal.Signals(number).name
        # `ray job stop` signals all processes of a job, and deploy/night.py passes its signal on: the driver gets two.
        if self.gentle and (self.asked is None or name == "SIGTERM"):
            self.asked = self.asked or name
            return
        self._raised = Stopped(f"stopped ({name}); the same command continues with what is done", 128 + number)
        raise self._raised


@contextlib.contextmanager
def connect(config: AnyConfig, base: BaseModel | None = None) -> Iterator[Stop]:
    """A connection to the Ray that `address.find` names, or to a new one of the run's own.

    Yields what takes the signals meanwhile. Raises UserError if it does not answer or the run cannot work there;
    with `base`, its memory and the disk are looked at too. On leaving, the connection is closed,
    and a Ray of the run's own with it.
    """
    ray_internals.quiet_ray()
    found = address.find()
    _init(found)
    if found == address.OWN and base is not None:
        with contextlib.suppress(Exception):  # Train makes it itself where it is missing
            ray_internals.begin_autoscaling_coordinator()
    try:
        with Stop() as stop:  # after ray.init, which sets a handler of its own
            resources = ray.cluster_resources()
            logger.info(
                f"ray: {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, {len(ray.nodes())} node(s)"
            )
            preflight.check(config, base)
            yield stop
    except BaseException:
        # A thread of Ray Data that calls Ray after shutdown kills the process silently, and the real error with it.
        # The threads end soon when what they read is wanted no longer.
        end = time.monotonic() + 1.0
        while ray_internals.reads_data() and time.monotonic() < end:
            time.sleep(0.02)
        raise
    finally:
        ray.shutdown()


def _init(found: str) -> None:
    """Join the Ray at an address, or start one; raises UserError if the former does not let us in."""
    variables = ray_internals.beside_job(ENVIRONMENT)  # what a job was submitted with has the last word
    shared: dict[str, Any] = {"logging_level": logging.WARNING, "runtime_env": {"env_vars": variables}}
    logger.info("starting Ray" if found == address.OWN else f"joining {address.name(found)}")
    if found == address.OWN:
        address.make_own()
        # It would start a process for each CPU and wait for all of them, and then use none: what runs here has an
        # environment of its own.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        # Ten processes, which take six seconds of a processor to start, and could start jobs for whoever asks them.
        # Who wants to look at it starts Ray themselves.
        try:
            ray.init(address=found, include_dashboard=False, **shared)
        except OSError as error:  # the system's limit is 107 bytes of a path
            if "AF_UNIX path length" not in str(error):
                raise
            folder = str(error).rpartition("bytes: ")[2].partition("/session_")[0]
            raise UserError(
                f"RAY_TMPDIR: Ray's files would lie in {folder}, and that path is too long for its sockets; set"
                " RAY_TMPDIR to a folder with a shorter one, as /tmp, which it takes before TMPDIR"
            ) from None
        return
    address.join(found, address.PATIENCE)
    try:
        ray.init(address=found, **shared)
    except (ConnectionError, RuntimeError, RayError) as error:  # another Python, or this machine is none of its nodes
        raise UserError(f"{address.name(found)}: cannot be joined: {' '.join(str(error).split())}") from error
