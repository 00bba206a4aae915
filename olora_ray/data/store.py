"""The token store: packed sequences on disk, addressed by what they were made of, read by number.

    <storage>/tokens/<digest>/
        shard-00000.arrow    packs, one row each (see shards.SCHEMA); memory-mapped
        shard-00000.json     written after it: the shard is done
        manifest.json        written last: the store is complete
        rejected.jsonl       the rows that could not be used, with the reason

Reading needs neither Ray nor the tokenizer.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs, ipc

from olora_ray import storage
from olora_ray.config import Config
from olora_ray.data import chance
from olora_ray.data.tokenize import TokenizerSpec
from olora_ray.errors import UserError

if TYPE_CHECKING:
    from olora_ray.data.preview import Preview

OPEN_SHARDS = 512
"""Shards that a process keeps mapped."""


@dataclass(frozen=True)
class Pack:
    """One sequence: several examples side by side that do not see each other."""

    input_ids: NDArray[np.int32]
    """(tokens,)"""
    supervised: NDArray[np.bool_]
    """(tokens,) which tokens count in the loss; never the first of a segment."""
    segments: tuple[int, ...]
    """Tokens of each example; they sum up to the length of the sequence."""


@dataclass(frozen=True)
class ShardInfo:
    """A line of the manifest."""

    packs: int
    tokens: int
    supervised: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a complete store holds."""

    digest: str
    rows: int
    """Rows read, rejected ones included."""
    rejected: dict[str, int]
    """Rows by the reason why they cannot be used."""
    examples: int
    packs: int
    tokens: int
    supervised: int
    fill: float
    """Tokens / (packs * max_length)."""
    max_length: int
    files: tuple[str, ...]
    """Where the rows came from; other files with the same content share the store."""
    shards: tuple[ShardInfo, ...] = field(repr=False)
    inputs: dict[str, Any] = field(repr=False)
    """What the digest was made of."""

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read `to_json` back; raises ValueError, KeyError or TypeError for anything else."""
        tree = json.loads(text)
        tree["shards"] = tuple(ShardInfo(**shard) for shard in tree["shards"])
        return cls(**{**tree, "files": tuple(tree["files"])})


class TokenStore:
    """A complete store, read by the number of the sequence. Pickles as its address."""

    def __init__(self, uri: str, manifest: Manifest) -> None:
        """Use `open`."""
        self.uri = uri
        self.manifest = manifest
        self.digest = manifest.digest
        self._ends = np.cumsum([shard.packs for shard in manifest.shards], dtype=np.int64)
        self._map = lru_cache(OPEN_SHARDS)(self._opened)

    @classmethod
    def open(cls, uri: str) -> "TokenStore":
        """Open a complete store; raises UserError if it is not complete or a shard is not what it was."""
        try:
            manifest = Manifest.from_json(storage.read_text(storage.join(uri, "manifest.json")))
        except FileNotFoundError:
            raise UserError(f"token store {uri}: not there, or not complete (no manifest.json)") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"token store {uri}: manifest.json is damaged ({error}); delete the folder") from None
        system, path = storage.filesystem(uri)
        sizes = {info.base_name: info.size for info in system.get_file_info(fs.FileSelector(path))}
        for number, shard in enumerate(manifest.shards):
            if (size := sizes.get(shard_name(number))) != shard.bytes:
                found = (
                    "is missing (does every node see this folder?)"
                    if size is None
                    else f"has {size} bytes instead of {shard.bytes}"
                )
                raise UserError(f"token store {uri}: {shard_name(number)} {found}; delete the folder to make it again")
        return cls(uri, manifest)

    def __reduce__(self) -> tuple[Callable[[str, Manifest], "TokenStore"], tuple[str, Manifest]]:
        """The address and the manifest; shards are mapped again where it arrives."""
        return TokenStore, (self.uri, self.manifest)

    def __len__(self) -> int:
        """Number of sequences."""
        return self.manifest.packs

    def __getitem__(self, index: int) -> Pack:
        """Sequence `index`, 0 <= index < len; a copy, so that it may be changed."""
        batch, row = self._find(index)
        return Pack(
            input_ids=_slice(batch, "input_ids", row).to_numpy().copy(),
            supervised=_slice(batch, "supervised", row).to_numpy(zero_copy_only=False),
            segments=tuple(_slice(batch, "segments", row).to_pylist()),
        )

    def supervised(self, indices: Iterable[int]) -> int:
        """How many tokens of these sequences count in the loss."""
        total = 0
        for index in indices:
            batch, row = self._find(int(index))
            total += batch.column("supervised_count")[row].as_py()
        return total

    def origins(self, index: int) -> list[str]:
        """Where the examples of a sequence came from, as file:line (a row number where there are no lines)."""
        from olora_ray.data.shards import place_name

        batch, row = self._find(index)
        return [place_name(self.manifest.files, origin) for origin in _slice(batch, "origin", row).to_pylist()]

    def _find(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._map(number), int(index - (self._ends[number - 1] if number else 0))

    def _opened(self, number: int) -> Any:
        path = self._local(number)
        wanted = self.manifest.shards[number]
        with path.open("rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256
        if not intact:
            raise UserError(
                f"token store {self.uri}: {shard_name(number)} is damaged; delete the folder to make it again"
            )
        return ipc.open_file(pa.memory_map(str(path))).get_batch(0)

    def _local(self, number: int) -> Path:
        """The shard as a local file; a remote one is downloaded once for all processes of the node."""
        uri = storage.join(self.uri, shard_name(number))
        if not storage.is_uri(uri):
            return Path(uri)
        folder = Path(tempfile.gettempdir()) / f"olora_ray-{os.getuid()}" / "tokens" / self.digest
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / shard_name(number)
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists() or path.stat().st_size != self.manifest.shards[number].bytes:
                storage.write_bytes(str(path), storage.read_bytes(uri))
        return path


def order(num_packs: int, seed: int, start: int, stop: int) -> NDArray[np.int64]:
    """Which sequences stand at places start..stop-1 of the endless training order, (stop - start,).

    The first epoch is the order of the store, which is shuffled; epoch e > 0 is a permutation that
    depends on (seed, e). Any range costs only its own length.
    """
    epoch, place = np.divmod(np.arange(start, stop, dtype=np.int64), num_packs)
    for number in np.unique(epoch[epoch > 0]):
        inside = epoch == number
        place[inside] = chance.permuted(place[inside], num_packs, chance.key("order", seed, number))
    return place


def prepare(
    config: Config, spec: TokenizerSpec, split: Literal["train", "eval"], say: Callable[[str], None] = print
) -> TokenStore:
    """The token store of a split: opened if it is complete, else made, or what is missing of it.

    Needs ray.init unless the data is small. Raises UserError for data that cannot be used.
    """
    from olora_ray.data import writer

    return writer.prepare(config, spec, split, say)


def describe(config: Config, spec: TokenizerSpec, limit: int = 2000) -> "Preview":
    """What preparing the training data would give, from about `limit` rows, without Ray; raises UserError."""
    from olora_ray.data import preview

    return preview.describe(config, spec, limit)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.arrow"


def _slice(batch: Any, column: str, row: int) -> Any:
    lists = batch.column(column)
    start, stop = lists.offsets[row].as_py(), lists.offsets[row + 1].as_py()
    return lists.values.slice(start, stop - start)
