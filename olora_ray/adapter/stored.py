"""The stored tensors of a model folder: where each one lies, and reading and writing some of its rows.

Plain reads and writes at byte offsets: memory holds what was asked for; only `mapped` maps, and one tensor.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olora_ray.common.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Precisions that a change can be added to, as safetensors spells them."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype as safetensors spells it, and its first byte in the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    """Bytes."""

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.start + self.size

    def read(self, folder: Path, first: int = 0, last: int | None = None) -> Tensor:
        """Rows first..last of it (all of it by default), of its own memory."""
        rows = self._rows(first, last)
        found = torch.empty(rows, dtype=DTYPES[self.dtype])
        with (folder / self.file).open("rb") as file:
            file.seek(self.start + first * self._row_bytes())
            if file.readinto(_bytes(found)) != found.nbytes:
                raise UserError(f"{folder / self.file} is cut off: {self.name} is not whole")
        return found

    def mapped(self, folder: Path) -> Tensor | None:
        """All of it as pages of the file; None if it does not lie in it as its precision needs it, or is cut off."""
        file, dtype = folder / self.file, DTYPES[self.dtype]
        if self.start % dtype.itemsize or not self.size or file.stat().st_size < self.end:
            return None
        pages = np.memmap(file, np.uint8, mode="c", offset=self.start, shape=(self.size,))
        return torch.from_numpy(pages).view(dtype).view(self.shape)

    def write(self, folder: Path, tensor: Tensor, first: int = 0) -> None:
        """Put rows in the place of those from `first` on, in a file that is there."""
        assert tensor.dtype == DTYPES[self.dtype]
        with (folder / self.file).open("r+b") as file:
            file.seek(self.start + first * self._row_bytes())
            file.write(_bytes(tensor.contiguous()))

    def _rows(self, first: int, last: int | None) -> tuple[int, ...]:
        if not self.shape:
            return ()
        return ((self.shape[0] if last is None else last) - first, *self.shape[1:])

    def _row_bytes(self) -> int:
        return self.size // self.shape[0] if self.shape and self.shape[0] else 0


def tensors(folder: Path) -> dict[str, Stored]:
    """All stored tensors by name; raises UserError for a folder without safetensors."""
    return {entry.name: entry for file in weight_files(folder) for entry in _header(folder / file)}


def weight_files(folder: Path) -> list[str]:
    """Names of the files of weights; raises UserError if one is not there, or lies elsewhere.

    Where one file lies beside an index it is that file, as for transformers, and not what the index names.
    """
    files = _indexed(folder) if _reads_index(folder) else [SINGLE]
    if outside := [name for name in files if name != os.path.basename(name)]:
        raise UserError(f"{folder}: {INDEX} names {outside[0]!r}, which is not a file in that folder")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(f"{folder}: no {missing[0]}; merging needs the base model's weights as safetensors")
    return files


def is_stale_index(folder: Path, name: str) -> bool:
    """Whether a file of the folder is an index of other files than those that are read."""
    beside = (folder / INDEX).is_file() and (folder / SINGLE).is_file()
    return name == INDEX and beside and _indexed(folder) != [SINGLE]


def _reads_index(folder: Path) -> bool:
    return (folder / INDEX).is_file() and not (folder / SINGLE).is_file()


def _indexed(folder: Path) -> list[str]:
    """The files that the index names."""
    return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))


def _header(path: Path) -> Iterator[Stored]:
    # The format: 8 bytes length of the header, the header (JSON), the tensors (huggingface/safetensors).
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield Stored(name, path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)


def _bytes(tensor: Tensor) -> memoryview:
    # A tensor of no dimension has no other view as bytes.
    flat = tensor.reshape(-1).view(torch.uint8) if math.prod(tensor.shape) else torch.empty(0, dtype=torch.uint8)
    return flat.numpy().data
