"""Checks that a file is still what the scan saw."""

import contextlib
import zlib
from collections.abc import Iterator
from functools import lru_cache

from olora_ray.common.errors import UserError
from olora_ray.data.addresses import open_filesystem
from olora_ray.data.sources import File

CHUNK = 8 * 2**20


class Changed(UserError):
    """A file, or what its storage returns of it, is not what the scan saw."""

    def __init__(self, file: File) -> None:
        super().__init__(
            f"{file.uri}: changed since it was looked at; run the same command again, and if it says the same, give all"
            " nodes the same file by this path"
        )
        self.file = file

    def __reduce__(self) -> tuple[type["Changed"], tuple[File]]:
        return Changed, (self.file,)


@contextlib.contextmanager
def steady(file: File) -> Iterator[tuple[int, int]]:
    """Size and time of change of a file, which must not change within the block; raises Changed."""
    state = _state(file)
    yield state
    if _state(file) != state:
        raise Changed(file)


def _state(file: File) -> tuple[int, int]:
    system, path = open_filesystem(file.uri)
    info = system.get_file_info(path)
    if not info.is_file:
        raise FileNotFoundError(path)
    return info.size, info.mtime_ns or 0


@contextlib.contextmanager
def as_scanned(file: File, crc: int) -> Iterator[None]:
    """Check that a file that is not read in bytes is what the scan saw, and stays so in the block; raises Changed."""
    with steady(file) as (size, modified):
        # A copy on another node may have another time: then its content decides.
        known = size == file.size and modified and modified == file.modified
        if not known and (size != file.size or _crc(file.uri, size, modified) != crc):
            raise Changed(file)
        yield


@lru_cache(maxsize=4096)
def _crc(uri: str, size: int, modified: int) -> int:
    """CRC-32 of a whole file as it is now; size and time of change are there for the cache."""
    system, path = open_filesystem(uri)
    crc = 0
    with system.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
