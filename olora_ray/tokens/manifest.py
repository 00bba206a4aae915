"""Manifest of a token store, and the sidecars of its shards.

Both are JSON with a *seal*, the digest of their own content: what a crash or a disk has damaged is
never taken for good, whatever still parses.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.sealed import seal, unseal

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class ShardInfo:
    """Facts that a reader needs of a shard: a line of the manifest, and a part of the sidecar."""

    packs: int
    tokens: int
    supervised: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, sidecar: dict[str, Any]) -> "ShardInfo":
        """The part of a sidecar."""
        return cls(*(sidecar[name] for name in ("packs", "tokens", "supervised", "bytes", "sha256")))


@dataclass(frozen=True)
class Outline:
    """The facts of a store that are known before any of it is made."""

    digest: str
    shards: int
    """Number of shards of the complete store."""
    max_length: int
    files: tuple[str, ...]
    """Files of the rows."""


@dataclass(frozen=True)
class Manifest:
    """Contents of a complete store."""

    digest: str
    rows: int
    """Rows read, rejected ones included."""
    rejected: dict[str, int]
    """Rows by the reason why they cannot be used."""
    rejected_sha256: str
    """Of rejected.jsonl."""
    examples: int
    packs: int
    tokens: int
    supervised: int
    fill: float
    """Tokens / (packs * max_length)."""
    max_length: int
    files: tuple[str, ...]
    """Files of the rows; other files with the same content share the store."""
    shards: tuple[ShardInfo, ...] = field(repr=False)
    inputs: dict[str, Any] = field(repr=False)
    """The inputs of the digest."""
    notes: dict[str, int] = field(default_factory=dict, repr=False)
    """Counts of what is odd about the rows (notes.py)."""

    def to_json(self) -> str:
        """The text of manifest.json."""
        return seal(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read `to_json` back; raises ValueError of one line for anything else."""
        try:
            found = _MANIFEST.validate_python(unseal(text))
        except ValidationError as error:
            wrong = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
        if min((0, *(shard.packs for shard in found.shards))) < 0:
            raise ValueError("a shard has less than no sequence")
        return found

    def outline(self) -> Outline:
        """The part that was known before."""
        return Outline(self.digest, len(self.shards), self.max_length, self.files)


_MANIFEST = TypeAdapter(Manifest)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.arrow"


def sidecar_name(number: int) -> str:
    """File name of a shard's sidecar."""
    return f"shard-{number:05d}.json"


def read_manifest(uri: str) -> Manifest:
    """The manifest of a store; raises FileNotFoundError, or ValueError if it is damaged."""
    return Manifest.from_json(storage.read_bytes(storage.join(uri, MANIFEST)).decode())


def file_size(uri: str, name: str) -> int | None:
    """Bytes of one file of a store; None if it is not there."""
    return storage.size(storage.join(uri, name))


PLACE_BITS = 40
"""An origin is (file number << PLACE_BITS) + place in the file."""


def place_name(files: Sequence[str], origin: int) -> str:
    """An origin as file:line, counted from 1."""
    if not 0 <= origin >> PLACE_BITS < len(files):
        raise UserError(f"token store: an example comes from file {origin >> PLACE_BITS}, but {len(files)} are listed")
    return f"{files[origin >> PLACE_BITS]}:{(origin & (2**PLACE_BITS - 1)) + 1}"
