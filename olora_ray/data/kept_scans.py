"""Scans that are kept: below the storage path there is one for each file, so an unchanged file is not read again.

A kept scan holds as long as size and time of change of its file do. On a local file system inode and time of the
last change of the inode are compared as well, which `cp -p` and `tar` cannot set back; where these alone differ, a
small file is read again and a large one is believed, since every node of a cluster may have a copy of its own.
An empty storage path keeps nothing.
"""

import base64
import contextlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from olora_ray.common import storage
from olora_ray.common.digests import digest
from olora_ray.common.sealed import read_sealed, seal
from olora_ray.data.addresses import open_filesystem
from olora_ray.data.sources import File
from olora_ray.data.units import UNIT, FileScan, Units

VERSION = 5
"""Changes whenever a kept scan would be another."""
SETTLED = 10.0
"""Seconds since its last change before which the scan of a file is not kept: clocks of storages are coarse, and a
file that changes twice within a tick shows one time."""
BELIEVED_FROM = 64 * 2**20
"""Bytes from which a file is believed to be unchanged though its inode is another."""
AT_ONCE = 16
"""Kept scans that are read at the same time: in an object store each is a request."""


def find(file: File, storage_root: str) -> FileScan | None:
    """The kept scan of a file; None if there is none, or the file has changed since."""
    if not (storage_root and file.modified) or (tree := read_sealed(_place(file, storage_root))) is None:
        return None
    if [tree.get("size"), tree.get("modified")] != [file.size, file.modified]:
        return None
    if file.size < BELIEVED_FROM and tree.get("state") != state_of(file):
        return None
    return _from_json(tree)


def find_all(files: Sequence[File], storage_root: str) -> list[FileScan | None]:
    """`find` for each of the files."""
    if len(files) < 2 or not storage.is_uri(storage_root):
        return [find(file, storage_root) for file in files]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda file: find(file, storage_root), files))


def state_of(file: File) -> list[int] | None:
    """Inode and the time of its last change, of a local file."""
    system, path = open_filesystem(file.uri)
    with contextlib.suppress(OSError):
        if system.type_name == "local":
            found = os.stat(path)
            return [found.st_ino, found.st_ctime_ns]
    return None


def keep(file: File, storage_root: str, scan: FileScan, state: list[int] | None) -> None:
    """Keep a scan; `state` is that of the file before it was scanned."""
    if storage_root and file.modified and time.time() - file.modified / 1e9 >= SETTLED:
        known = {"size": file.size, "modified": file.modified, "state": state}
        storage.write_text(_place(file, storage_root), seal({**known, **_to_json(scan)}), durable=False)


def forget(file: File, storage_root: str) -> None:
    """Drop the kept scan of a file that has other content, though size and time of change are the same."""
    if storage_root:
        storage.remove(_place(file, storage_root))


def _place(file: File, storage_root: str) -> str:
    return storage.join(storage_root, "tokens", "scans", f"{digest(VERSION, file.uri, length=32)}.json")


def _to_json(scan: FileScan) -> dict[str, Any]:
    units = base64.b64encode(scan.units.table.tobytes()).decode()
    return {"sha256": scan.sha256, "rows": scan.rows, "columns": scan.columns, "units": units}


def _from_json(tree: dict[str, Any]) -> FileScan:
    units = np.frombuffer(base64.b64decode(tree["units"]), dtype=UNIT)
    return FileScan(tree["sha256"], tree["rows"], tuple(tree["columns"]), Units(units))
