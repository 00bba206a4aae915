"""Files of a store's shards on this node: fetched if the store is not local, verified, and mapped into memory."""

import fcntl
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from olora_ray.common import local_files, node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.tokens.manifest import ShardInfo, shard_name
from olora_ray.tokens.verified import Verified


class ShardFiles:
    """The shards of a store as files of this node."""

    def __init__(self, uri: str, digest: str) -> None:
        self.uri, self.digest = uri, digest

    def open(self, number: int, info: ShardInfo) -> Any:
        """The shard, mapped into memory; raises UserError if it is missing or not what `info` says."""
        try:
            path = self._local(number, info)
            intact = self._verified.intact(path, info.sha256)
            # This node's copy may be damaged while the store's file is good: fetch it once more before giving up.
            if not intact and storage.is_uri(self.uri):
                path = self._local(number, info, again=True)
                intact = self._verified.intact(path, info.sha256)
        except FileNotFoundError:
            raise UserError(
                f"token store {self.uri}: {shard_name(number)} is missing (does every node see this folder?)"
            ) from None
        if not intact:
            raise UserError(
                f"token store {self.uri}: {shard_name(number)} is damaged; delete this file and start the run again"
            )
        batch = ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        if batch.num_rows != info.packs:
            raise UserError(f"token store {self.uri}: {shard_name(number)} does not belong to its manifest.json")
        return batch

    def _local(self, number: int, info: ShardInfo, again: bool = False) -> Path:
        """The shard as a local file; a remote one is downloaded once for all processes of the node."""
        uri = storage.join(self.uri, shard_name(number))
        if not storage.is_uri(uri):
            return Path(uri)
        root = local_files.private_folder("olora_ray") / "tokens"
        folder = root / self.digest
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / shard_name(number)
        # All workers of the node meet here: one downloads, the others wait and find the file.
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if again or not path.exists() or path.stat().st_size != info.bytes:
                storage.write_bytes(str(path), storage.read_bytes(uri))
                node_cache.make_room(root, root.glob("*/*.arrow"))
        node_cache.used(path)
        return path

    @cached_property
    def _verified(self) -> Verified:
        return Verified(self.digest)
