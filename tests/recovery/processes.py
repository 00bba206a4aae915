"""A place below /tmp whose path marks the processes of one run, and what can be done to them."""

import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder with a short path (sockets lie below it); on leaving, its processes are killed and it is removed."""
    folder = Path(tempfile.mkdtemp(prefix="olr-", dir="/tmp"))
    try:
        yield folder
    finally:
        kill_all(folder)
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(mark: Path) -> list[psutil.Process]:
    """Every process whose environment names the folder, and what descends from it."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if any(is_below(value, mark) for value in process.environ().values()):
                found |= {one.pid: one for one in [process, *process.children(recursive=True)]}
    return [process for process in found.values() if is_alive(process)]


def is_below(value: str, mark: Path) -> bool:
    """Whether an environment variable's value names the folder or something in it."""
    return any(f"{mark}{end}" in f"{value} " for end in ("/", ";", ":", " "))


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def kill_all(mark: Path) -> None:
    """SIGKILL for all of them at once, again until none is left."""
    end = time.monotonic() + 30
    while (left := processes_of(mark)) and time.monotonic() < end:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        time.sleep(0.1)


def controllers(mark: Path) -> list[psutil.Process]:
    """The processes that hold the run's Train controller."""
    return _titled(mark, "TrainController")


def workers(mark: Path) -> list[psutil.Process]:
    """The run's training workers, those included that are still on their way; in the order of their pids."""
    return sorted(_titled(mark, "RayTrainWorker"), key=lambda process: process.pid)


def _titled(mark: Path, title: str) -> list[psutil.Process]:
    return [process for process in processes_of(mark) if title in " ".join(command(process))]


def command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
