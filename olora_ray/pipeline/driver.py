"""One driver a run: a second one that is given the same run.name leaves, or waits, and says who works on it.

Two at once would write every metric twice, register two versions, and delete each other's checkpoints. The lock lies
under run.storage, so it holds on all hosts; what it promises stands in common/lock.py.
"""

import contextlib
import threading
from collections.abc import Iterator

from olora_ray.common import lock, storage
from olora_ray.common.errors import TakenOver, TryAgain
from olora_ray.config.schema import Config
from olora_ray.pipeline.signals import Stop

LOOK = 10.0
"""Seconds between two looks at whether the run is still ours."""


class Driver:
    """This process as the one that works on a run; made by `only_driver`."""

    def __init__(self, lease: lock.Lock) -> None:
        self._lease = lease

    def check(self) -> None:
        """Raise TakenOver if another process works on the run by now, or may do so since that cannot be read.

        Call it before what must not be done twice.
        """
        try:
            self._look()
        except lock.LockUnreadable as error:
            raise TakenOver(f"{error}; the same command goes on with the run", error.exit_code) from None

    @contextlib.contextmanager
    def watch(self, stop: Stop) -> Iterator[None]:
        """End the block, wherever it is, with TakenOver once another process works on the run."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stop, ended), name="driver", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _watch(self, stop: Stop, ended: threading.Event) -> None:
        while not ended.wait(LOOK):
            try:
                self._look()
            except TakenOver as error:
                stop.abandon(error)
                return
            except lock.LockUnreadable:
                continue  # the storage does not answer: the training notices that by itself

    def _look(self) -> None:
        """Raise TakenOver if another process works on the run by now, LockUnreadable if that cannot be said."""
        try:
            self._lease.check()
        except lock.LockUnreadable:
            raise
        except TryAgain as error:
            raise TakenOver(f"{error}; it goes on with the run", error.exit_code) from None


@contextlib.contextmanager
def only_driver(config: Config) -> Iterator[Driver]:
    """This process as the only one that works on the config's run, for the block.

    Waits `run.wait` seconds for another one to end. Raises TryAgain that says who it is if it has not.
    """
    name = config.run.name
    place = storage.join(config.run.storage, "locks", "runs", f"{name}.json")
    remedy = "choose another run.name, or set run.wait to wait for it"
    with lock.held(place, f"run.name: {name!r}", config.run.wait, remedy) as lease:
        yield Driver(lease)
