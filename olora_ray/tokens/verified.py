"""Files of this node whose content was found to be right, so that each is hashed once a node and not at each opening.

What was found is noted for the file's inode, size and times, in the user's own folder and until the machine is
started again. Whatever writes to a file sets the time of change of its inode, which no program can set back; what a
disk returns wrongly later is not seen before the next start.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from olora_ray.common import local_files
from olora_ray.common.digests import digest_file

BOOT = Path("/proc/sys/kernel/random/boot_id")
SETTLED = 10.0
"""Seconds since its last change before which a file is not noted: one that changes twice within a tick of the file
system's clock shows one time."""


class Verified:
    """The files that were verified on this node under one name; processes share them."""

    def __init__(self, name: str) -> None:
        self._known: set[str] = set()
        self._read = 0
        self._notes = _notes_of(name)

    def intact(self, path: Path, sha256: str) -> bool:
        """Whether the content of a file has this digest; raises FileNotFoundError."""
        if self._is_known(_line(path, sha256)):
            return True
        with self._alone(sha256):  # all workers of a node come at the same time: one reads, the others find its note
            line = _line(path, sha256)
            if self._is_known(line):
                return True
            if digest_file(path) != sha256:
                return False
            if line == _line(path, sha256) and time.time() - path.stat().st_ctime >= SETTLED:
                self._note(line)
            return True

    def _is_known(self, line: str) -> bool:
        if line not in self._known and self._notes is not None:
            with contextlib.suppress(OSError), self._notes.open("rb") as notes:
                notes.seek(self._read)
                content = notes.read()
                whole = content.rfind(b"\n") + 1
                self._known.update(content[:whole].decode("ascii", "replace").splitlines())
                self._read += whole
        return line in self._known

    def _note(self, line: str) -> None:
        if self._notes is not None:
            with contextlib.suppress(OSError), self._notes.open("a", encoding="ascii") as notes:
                notes.write(f"{line}\n")  # so short that it is appended as a whole

    @contextlib.contextmanager
    def _alone(self, sha256: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                if self._notes is not None:
                    lock = stack.enter_context((self._notes.parent / "lock").open("a"))
                    fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(sha256[:6], 16))
            yield


def _notes_of(name: str) -> Path | None:
    """The file of the notes, which need not be there yet; None where nothing can be noted."""
    try:
        boot = BOOT.read_text(encoding="ascii").strip()
        folder = local_files.private_folder("olora_ray") / "verified"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.txt"):
            if boot not in old.name:
                old.unlink(missing_ok=True)
    except OSError:
        return None
    return folder / f"{name}-{boot}.txt"


def _line(path: Path, sha256: str) -> str:
    found = os.stat(path)
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return " ".join(map(str, (sha256, *state)))
