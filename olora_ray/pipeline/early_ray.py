"""A Ray of the run's own that starts while the driver finds the base model and plans the run.

Ray's start is mostly waiting for other processes, and the driver's work before it needs one CPU.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import ray

from olora_ray.pipeline.signals import Stop


class RayStart:
    """A start of Ray in a thread of its own."""

    def __init__(self, start: Callable[[], None]) -> None:
        """Begin; `start` is ray.init with what belongs to it."""
        self._started: Future[None] = Future()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(start,), name="ray", daemon=True)
        self._thread.start()

    def _run(self, start: Callable[[], None]) -> None:
        try:
            start()
        except BaseException as error:  # for `join`
            self._started.set_exception(error)
        else:
            self._started.set_result(None)
        # Linux kills Ray's processes once the thread that has started them ends (PR_SET_PDEATHSIG, which Ray sets).
        self._ended.wait()

    def join(self) -> None:
        """Wait until Ray has started; raises what `start` did."""
        self._started.result()

    def end(self) -> None:
        """End Ray, if it has started by then or is about to."""
        self._started.exception()  # ray.init cannot be interrupted
        ray.shutdown()
        self._ended.set()
        self._thread.join()


@contextlib.contextmanager
def starting(start: Callable[[], None]) -> Iterator[RayStart]:
    """`start` runs beside the block; on leaving Ray is ended. Signals end the block with Stopped."""
    with Stop():
        begun = RayStart(start)
        try:
            yield begun
        finally:
            begun.end()
