"""SIGTERM and Ctrl+C: a request to stop after the next step while training, an immediate end elsewhere."""

import signal
import threading
from types import FrameType, TracebackType

from olora_ray.common.errors import Stopped, TakenOver

AGAIN = "the same command continues from there"


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        return Stopped(f"{where} ({name}); {AGAIN}", 128 + signal.Signals[name].value)

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
