"""Results of checks that follow from their inputs alone, kept on this node: the next start need not find them again.

What they follow from is in the name of the file: the inputs, the versions of the libraries, and this project's code.
"""

import contextlib
import platform
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from olora_ray.common import copies, digests, storage

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "flash-attn", "kernels")
OLD = 90 * 24 * 3600.0
"""Seconds after which a result is found anew: most are of another version then, and nobody asks for them."""
PACKAGE = Path(__file__).resolve().parents[1]


def place(what: str, *inputs: object) -> str:
    """The file in which a result is kept; another for any other input, library or line of code."""
    return storage.join(copies.CACHE, what, digests.digest(code(), *inputs, length=32))


def read(place: str) -> str | None:
    """A kept result; None if there is none, or it cannot be read."""
    try:
        return storage.read_text(place)
    except (OSError, UnicodeDecodeError):
        return None


def keep(place: str, result: str) -> None:
    """Keep a result; where nothing can be written it is found anew each time. Old ones beside it are removed."""
    with contextlib.suppress(OSError):
        storage.write_text(place, result)
        for file in Path(place).parent.iterdir():
            if time.time() - file.stat().st_mtime > OLD:
                file.unlink()


@cache
def code() -> str:
    """Digest of what computes here: this project's code, and the versions of Python and the libraries."""
    found = [f"{name} {_version(name)}" for name in LIBRARIES]
    files = sorted(PACKAGE.rglob("*.py"))
    return digests.digest(platform.python_version(), platform.machine(), *found, *map(digests.digest_file, files))


@cache
def project(package: Path = PACKAGE) -> str:
    """Digest of this project's code alone; of another copy of it, if `package` is the folder of one."""
    files = sorted(package.rglob("*.py"))
    lines = (f"{file.relative_to(package).as_posix()}:{digests.digest_file(file)}" for file in files)
    return digests.digest(*lines, length=12)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
