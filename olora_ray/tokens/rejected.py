"""Rejected rows of a store that is being made, in a temporary file: of a billion rows there may be millions."""

import hashlib
import io
import json
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from olora_ray.common import storage
from olora_ray.tokens.plan import Plan

IN_MEMORY = 4 * 2**20
"""Bytes from which on they are written to the disk."""
CHUNK = 2**20


class RejectedRows:
    """The lines of rejected.jsonl, put in shard by shard in any order, and read in the order of the shards.

    A row that weights repeat is listed once, where it comes first.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._repeats = any(turn for turn, _ in plan.shards.pieces.takes)
        self._file: IO[bytes] = io.BytesIO()
        self._end = 0
        self._places: dict[int, tuple[int, int]] = {}
        """Start and end of each shard's lines in the file."""

    def put(self, number: int, entries: Sequence[dict[str, Any]]) -> None:
        """Take the rejected rows of a shard, as its sidecar has them, in place of those that it had."""
        lines = dict.fromkeys(json.dumps(entry, ensure_ascii=True) for entry in self._first(number, entries))
        content = "".join(f"{line}\n" for line in lines).encode()
        self._file.seek(self._end)
        self._file.write(content)
        self._places[number] = (self._end, self._end + len(content))
        self._end += len(content)
        if self._end > IN_MEMORY and isinstance(self._file, io.BytesIO):
            self._file = _on_disk(self, self._file)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The entries."""
        for number in sorted(self._places):
            for line in b"".join(self._read(number)).splitlines():
                yield json.loads(line)

    def chunks(self) -> Iterator[bytes]:
        """The content of rejected.jsonl, in parts."""
        for number in sorted(self._places):
            yield from self._read(number)

    def sha256(self) -> str:
        """The digest of that content."""
        found = hashlib.sha256()
        for chunk in self.chunks():
            found.update(chunk)
        return found.hexdigest()

    def write(self, place: str) -> None:
        """Write rejected.jsonl."""
        storage.write_chunks(place, self.chunks)

    def _read(self, number: int) -> Iterator[bytes]:
        start, end = self._places[number]
        while start < end:
            self._file.seek(start)
            chunk = self._file.read(min(CHUNK, end - start))
            start += len(chunk)
            yield chunk

    def _first(self, number: int, entries: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Those of the first turn over their source: it has every row that a later turn repeats, and comes before."""
        if not (self._repeats and entries):
            return entries
        pieces = self._plan.shards[number]
        first = np.array([turn == 0 for turn, _ in pieces.takes])[pieces.take]
        spans: dict[tuple[int, str], list[tuple[int, int]]] = {}
        for piece in pieces[np.flatnonzero(first)]:
            planned, unit = self._plan.files[piece.file], piece.unit
            spans.setdefault((planned.source, planned.file.uri), []).append((unit.first, unit.first + unit.rows))
        return [
            entry for entry in entries if _inside(entry["line"] - 1, spans.get((entry["source"], entry["file"]), ()))
        ]


def _on_disk(owner: RejectedRows, content: io.BytesIO) -> IO[bytes]:
    """A temporary file that begins with the content; closed, and so removed, when its owner is gone."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    weakref.finalize(owner, file.close)
    file.write(content.getbuffer())
    return file


def _inside(place: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(low <= place < high for low, high in spans)
