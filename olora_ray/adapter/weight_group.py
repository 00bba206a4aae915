"""Stored tensors and the parameters that transformers makes of them, both ways.

Most parameters are one stored tensor as it is. Others are put together at loading: experts that are stored one by one
become one parameter, a fused one is split, some are transposed or interleaved. All of these only move numbers. So the
way back needs no inverse of each operation: transformers' own conversion is run on the places of the numbers instead
of on the numbers, and says where each number of a parameter came from.
"""

import copy
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olora_ray.adapter.stored import DTYPES, Stored

AT_ONCE = 2**23
"""Numbers of a stack of experts that are in memory together, unless one expert has more."""
_LARGEST_TRIAL = 2**27
"""Numbers on which a conversion is tried; a larger one that cannot be taken in parts is not."""
_KEPT = 2
"""Conversions whose places are kept: blocks of a model repeat two kinds of stacks."""


@dataclass(frozen=True)
class Group:
    """Stored tensors that transformers turns into parameters together."""

    parts: Mapping[str, tuple[Stored, ...]]
    """By the pattern of their names, in the order in which they are put together."""
    key: str
    """The name under which transformers collects them: the first of the parameters."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of all the parameters that are made of them."""
    converter: Any
    """transformers' WeightConverter; None where the one tensor is the one parameter as it is."""
    model: Any
    """Some conversions look at the shapes of the model's parameters."""
    layers: Mapping[str, str]
    """Adapted layer -> its parameter."""

    @property
    def stored(self) -> list[Stored]:
        """All its tensors."""
        return [entry for entries in self.parts.values() for entry in entries]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of all its tensors."""
        return DTYPES[self.stored[0].dtype]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(entry.size for entry in self.stored)

    def steps(self) -> Iterator[tuple[int, int]]:
        """Rows first..last of the parameters that are worked on together: some experts of a stack, or all rows."""
        rows = self._rows
        each = sum(math.prod(shape[1:]) for shape in self.shapes.values())
        count = rows if self._way == "whole" else max(1, AT_ONCE // max(each, 1))
        for first in range(0, rows, count):
            yield first, min(first + count, rows)

    def read(self, folder: Path, first: int, last: int) -> Tensor:
        """The numbers of the stored tensors that rows first..last come from, one after the other."""
        found = [piece.stored.read(folder, *piece.rows).view(-1) for piece in self._pieces(first, last)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def write(self, folder: Path, numbers: Tensor, first: int, last: int) -> None:
        """Put back what `read` gives, in files that are there."""
        pieces = self._pieces(first, last)
        for piece, part in zip(pieces, numbers.split([piece.size for piece in pieces]), strict=True):
            piece.stored.write(folder, part.view(piece.shape), piece.rows[0])

    def rows(self, numbers: Tensor, parameter: str, first: int, last: int) -> Tensor:
        """Rows first..last of a parameter."""
        if self.converter is None:
            return numbers.view(last - first, *self.shapes[parameter][1:])
        return numbers[self._places(first, last)[parameter]]

    def put(self, numbers: Tensor, parameter: str, rows: Tensor, first: int, last: int) -> None:
        """Change the numbers that rows first..last of a parameter come from."""
        if self.converter is None:
            numbers.copy_(rows.reshape(-1))
        else:
            numbers[self._places(first, last)[parameter]] = rows

    @property
    def in_parts(self) -> bool:
        """Whether some rows of a parameter can be read without the others."""
        return self.converter is None or self._way != "whole"

    def take(self, folder: Path, parameter: str, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first..last of a parameter in `dtype`, as from_pretrained makes them: rounded first, then converted.

        Of a stack only its experts first..last are read; other conversions need all that they are made of.
        """
        if self.converter is None:
            return self.stored[0].read(folder, first, last).to(dtype)
        whole = not self.in_parts
        count = max(1, AT_ONCE // max(math.prod(self.shapes[parameter][1:]), 1))
        spans = [(0, self._rows)] if whole else [(at, min(at + count, last)) for at in range(first, last, count)]
        found = []
        for span in spans:
            pieces = self._pieces(*span)
            named = [(piece.pattern, piece.stored.read(folder, *piece.rows).to(dtype)) for piece in pieces]
            found.append(convert(self.converter, self.key, named, self.model)[parameter])
        return found[0][first:last] if whole else torch.cat(found)

    def problem(self) -> str | None:
        """Why a change of the parameters cannot be brought back to the stored tensors; None if it can."""
        if self.converter is None:
            return None
        kind = self._kind(0)
        if kind not in _problems:
            _problems[kind] = self._problem()
        return _problems[kind]

    def _problem(self) -> str | None:
        first, last = 0, self._rows if self._way == "whole" else 1
        size = sum(piece.size for piece in self._pieces(first, last))
        if size > _LARGEST_TRIAL:
            return None
        try:
            found = torch.cat([place.reshape(-1) for place in self._places(first, last).values()])
        except Exception as error:  # of transformers' operations, whatever they meet
            return f"transformers' conversion of its stored tensors cannot be followed ({type(error).__name__})"
        finally:
            _cache.clear()
        return None if _is_permutation(found, size) else "transformers does more than move the numbers of its parts"

    @cached_property
    def _rows(self) -> int:
        return next(iter(self.shapes.values()))[0]

    @cached_property
    def _way(self) -> str:
        """How some experts are taken without the others: "tensors" of their own, "rows" of one; else "whole"."""
        if any(len(shape) != 3 or shape[0] != self._rows for shape in self.shapes.values()):
            return "whole"
        operations = [] if self.converter is None else list(self.converter.operations)
        stored = self.stored
        if len(stored) == 1 and len(stored[0].shape) == 3 and stored[0].shape[0] == self._rows:
            return "rows" if _within_experts(operations) else "whole"
        merged = bool(operations) and type(operations[0]).__name__ == "MergeModulelist" and operations[0].dim == 0
        if merged and all(len(part) == self._rows for part in self.parts.values()):
            return "tensors" if _within_experts(operations[1:]) else "whole"
        return "whole"

    def _pieces(self, first: int, last: int) -> list["_Piece"]:
        found = []
        for pattern, part in self.parts.items():
            for stored in part[first:last] if self._way == "tensors" else part:
                rows = (first, last) if self._way == "rows" else (0, stored.shape[0])
                found.append(_Piece(pattern, stored, rows))
        return found

    def _places(self, first: int, last: int) -> dict[str, Tensor]:
        """For each parameter, where in what `read` gives its numbers lie."""
        kind = self._kind(last - first)
        if kind not in _cache:
            start, codes = 0, []
            for piece in (pieces := self._pieces(first, last)):
                codes.append(torch.arange(start, start + piece.size).view(piece.shape))
                start += piece.size
            named = [(piece.pattern, code) for piece, code in zip(pieces, codes, strict=True)]
            found = convert(self.converter, self.key, named, self.model)
            _cache[kind] = [found[name].contiguous() for name in self.shapes]
        _cache.move_to_end(kind)
        while len(_cache) > _KEPT:
            _cache.popitem(last=False)
        return dict(zip(self.shapes, _cache[kind], strict=True))

    def _kind(self, count: int) -> tuple[str, str, str, int]:
        """The same for groups whose numbers are moved alike: those of other blocks."""
        return re.sub(r"\d+", "*", self.key), str(self.converter), str(list(self.shapes.values())), count


@dataclass(frozen=True)
class _Piece:
    """Rows of a stored tensor."""

    pattern: str
    stored: Stored
    rows: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows[1] - self.rows[0], *self.stored.shape[1:])

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def convert(converter: Any, key: str, tensors: Sequence[tuple[str, Tensor]], model: Any) -> dict[str, Tensor]:
    """What transformers makes of tensors, each with the pattern of its name: parameter -> tensor."""
    fresh = copy.deepcopy(converter)
    for pattern, tensor in tensors:
        fresh.add_tensor(key, key, pattern, tensor)
    found = fresh.convert(key, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


_cache: OrderedDict[tuple[str, str, str, int], list[Tensor]] = OrderedDict()
_problems: dict[tuple[str, str, str, int], str | None] = {}


def _is_permutation(places: Tensor, size: int) -> bool:
    """Whether each of the places 0..size occurs once."""
    if places.numel() != size or int(places.min()) < 0 or int(places.max()) >= size:
        return False
    seen = torch.zeros(size, dtype=torch.bool)
    seen[places] = True
    return bool(seen.all())


def _within_experts(operations: Sequence[Any]) -> bool:
    """Whether operations leave the first dimension alone."""
    known = ("Concatenate", "Transpose", "Chunk", "Interleave")
    return all(
        type(operation).__name__ in known
        and not getattr(operation, "check_dims", False)
        and all(getattr(operation, name, 1) >= 1 for name in ("dim", "dim0", "dim1"))
        for operation in operations
    )
