"""The stored tensors of a model folder: their positions in the files, and reading and writing some of their rows.

Reads and writes at byte offsets, so that memory holds only the rows asked for; only `mapped` maps a file, one tensor of
it.
"""

import copy
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from olora_ray.common.errors import UserError
from olora_ray.common.text import plural, some
from olora_ray.model.folder import (
    INDEX,
    SINGLE,
    indexed,
    is_unknown_bias,
    unsupported_bias,
    unsupported_packing,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The precisions to which a change can be added, by safetensors' names."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype by safetensors' name, and the offset of its first byte."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    """Unit: bytes."""

    @property
    def end(self) -> int:
        return self.start + self.size

    def read(self, folder: Path, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows first..last (all by default), in memory of their own."""
        shape = self.shape
        if shape:
            if last is None:
                last = shape[0]
            shape = (last - first, *shape[1:])
        rows_read = torch.empty(shape, dtype=DTYPES[self.dtype])
        with (folder / self.file).open("rb") as file:
            file.seek(self.start + first * self._row_bytes())
            if file.readinto(_bytes(rows_read)) != rows_read.nbytes:
                raise UserError(
                    f"{folder / self.file} is cut off within {self.name}: download the file again"
                )
        return rows_read

    def mapped(self, folder: Path) -> Tensor | None:
        """Return the whole tensor as mapped pages of the file; None if it is misaligned or cut off."""
        file = folder / self.file
        dtype = DTYPES[self.dtype]
        if self.start % dtype.itemsize or not self.size or file.stat().st_size < self.end:
            return None
        pages = np.memmap(file, np.uint8, mode="c", offset=self.start, shape=(self.size,))
        return torch.from_numpy(pages).view(dtype).view(self.shape)

    def write(self, folder: Path, tensor: Tensor, first: int = 0) -> None:
        """Write rows over those from `first` on, in an existing file."""
        assert tensor.dtype == DTYPES[self.dtype]
        with (folder / self.file).open("r+b") as file:
            file.seek(self.start + first * self._row_bytes())
            file.write(_bytes(tensor.contiguous()))

    def _row_bytes(self) -> int:
        if not self.shape or not self.shape[0]:
            return 0
        return self.size // self.shape[0]


def tensors(folder: Path) -> dict[str, Stored]:
    """Return all stored tensors by name; raises UserError for a folder without safetensors."""
    found = {}
    for name in weight_files(folder):
        # The format: 8 bytes with the header's length, the header (JSON), the tensors (huggingface/safetensors).
        with (folder / name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for tensor, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            start = 8 + length + begin
            found[tensor] = Stored(tensor, name, entry["dtype"], shape, start, end - begin)
    return found


def weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files; raises UserError if one is missing, or lies in another folder."""
    # If a single file lies beside an index, transformers reads the single file and ignores the index.
    files = [SINGLE]
    if not (folder / SINGLE).is_file():
        files = indexed(folder) or files
    for name in files:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: no {name}; merging needs the base model's weights as safetensors"
            )
    return files


def is_stale_index(folder: Path, name: str) -> bool:
    """True if `name` is an index that is ignored, because the folder's single weight file is read instead."""
    return name == INDEX and (folder / SINGLE).is_file() and indexed(folder) not in ([], [SINGLE])


def _bytes(tensor: Tensor) -> memoryview:
    # A scalar has no view as bytes, so it becomes a tensor of one dimension; an empty tensor has no view at all.
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# Stored tensors and the parameters that transformers converts them to, in both directions.


AT_ONCE = 2**23
"""Numbers of a stack of experts that are in memory at once, unless one expert has more."""


@dataclass(frozen=True)
class Group:
    """Stored tensors that transformers converts to parameters together."""

    parts: Mapping[str, tuple[Stored, ...]]
    """Pattern of their names -> tensors, in the order in which they are put together."""
    key: str
    """The name under which transformers collects them: the first of the parameters."""
    shapes: Mapping[str, tuple[int, ...]]
    """Parameter -> shape, for all parameters of this group."""
    converter: Any
    """transformers' WeightConverter; None if the one tensor is the one parameter, unchanged."""
    model: Any
    """The model without weights, because some conversions read the shapes of its parameters."""
    layers: Mapping[str, str]
    """Adapted layer -> its parameter."""

    @property
    def stored(self) -> list[Stored]:
        return list(itertools.chain(*self.parts.values()))

    @property
    def odd(self) -> Stored | None:
        """The first stored tensor without a precision to which a change can be added; None if there is none."""
        return next((entry for entry in self.stored if entry.dtype not in DTYPES), None)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored[0].dtype]

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.stored)

    def steps(self) -> Iterator[tuple[int, int]]:
        """Yield ranges first..last of rows that are worked on together: some experts of a stack, or all rows."""
        rows = self._rows
        count = rows
        if self._way != "whole":
            each = sum(math.prod(shape[1:]) for shape in self.shapes.values())
            count = max(1, AT_ONCE // max(each, 1))
        for first in range(0, rows, count):
            yield first, min(first + count, rows)

    def read(self, folder: Path, first: int, last: int) -> Tensor:
        parts = [
            piece.stored.read(folder, *piece.rows).view(-1) for piece in self._pieces(first, last)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)

    def write(self, folder: Path, numbers: Tensor, first: int, last: int) -> None:
        pieces = self._pieces(first, last)
        parts = numbers.split([piece.size for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            piece.stored.write(folder, part.view(piece.shape), piece.rows[0])

    def rows(self, numbers: Tensor, parameter: str, first: int, last: int) -> Tensor:
        if self.converter is None:
            return numbers.view(last - first, *self.shapes[parameter][1:])
        return numbers[self._positions_of(first, last)[parameter]]

    def put(self, numbers: Tensor, parameter: str, rows: Tensor, first: int, last: int) -> None:
        if self.converter is None:
            numbers.copy_(rows.reshape(-1))
        else:
            numbers[self._positions_of(first, last)[parameter]] = rows

    @property
    def in_parts(self) -> bool:
        """True if some rows of a parameter can be read without the others."""
        return self.converter is None or self._way != "whole"

    def take(
        self, folder: Path, parameter: str, first: int, last: int, dtype: torch.dtype
    ) -> Tensor:
        """Return rows first..last of a parameter in `dtype`, as from_pretrained computes them: rounded, then converted.

        For a stack only experts first..last are read; other conversions read all their tensors.
        """
        if self.converter is None:
            return self.stored[0].read(folder, first, last).to(dtype)
        if not self.in_parts:
            return self._converted(folder, 0, self._rows, dtype)[parameter][first:last]
        count = max(1, AT_ONCE // max(math.prod(self.shapes[parameter][1:]), 1))
        parts = []
        for start in range(first, last, count):
            stop = min(start + count, last)
            parts.append(self._converted(folder, start, stop, dtype)[parameter])
        return torch.cat(parts)

    def _converted(
        self, folder: Path, first: int, last: int, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        named = [
            (piece.pattern, piece.stored.read(folder, *piece.rows).to(dtype))
            for piece in self._pieces(first, last)
        ]
        return convert(self.converter, self.key, named, self.model)

    def problem(self) -> str | None:
        """Return the reason why a change cannot be written into the stored tensors; None if it can."""
        if self.converter is None:
            return None
        last = self._rows if self._way == "whole" else 1
        size = sum(piece.size for piece in self._pieces(0, last))
        # A large group that can only be converted as a whole is not tried: it would take too much memory.
        if size > 2**27:
            return None
        try:
            positions = torch.cat([part.reshape(-1) for part in self._find_positions(0, last)])
        except Exception as error:  # transformers' operations raise all kinds of errors
            return f"it is not known how transformers converts its stored tensors ({type(error).__name__})"
        if positions.numel() == size and positions.min() >= 0 and positions.max() < size:
            seen = torch.zeros(size, dtype=torch.bool)
            seen[positions] = True
            if seen.all():
                return None
        return "transformers does more than rearrange its stored numbers"

    @cached_property
    def _rows(self) -> int:
        return next(iter(self.shapes.values()))[0]

    @cached_property
    def _way(self) -> str:
        """The part that holds some experts: "tensors" of their own, "rows" of one tensor, or the "whole" group."""
        if any(len(shape) != 3 or shape[0] != self._rows for shape in self.shapes.values()):
            return "whole"
        operations = [] if self.converter is None else list(self.converter.operations)
        stored = self.stored
        way = "whole"
        if len(stored) == 1 and len(stored[0].shape) == 3 and stored[0].shape[0] == self._rows:
            way = "rows"
        elif operations and type(operations[0]).__name__ == "MergeModulelist":
            merge = operations.pop(0)
            if merge.dim == 0 and all(len(part) == self._rows for part in self.parts.values()):
                way = "tensors"
        return way if _within_experts(operations) else "whole"

    def _pieces(self, first: int, last: int) -> list["_Piece"]:
        pieces = []
        for pattern, part in self.parts.items():
            if self._way == "tensors":
                part = part[first:last]
            for stored in part:
                rows = (0, stored.shape[0])
                if self._way == "rows":
                    rows = (first, last)
                pieces.append(_Piece(pattern, stored, rows))
        return pieces

    def _positions_of(self, first: int, last: int) -> dict[str, Tensor]:
        """Return parameter -> the positions of its numbers in the vector that `read` returns."""
        key = (*self.kind, str(last - first))
        if key not in _positions:
            positions = self._find_positions(first, last)
            # Two are kept, because the blocks of a model repeat two kinds of stacks.
            if len(_positions) > 1:
                del _positions[next(iter(_positions))]
            _positions[key] = positions
        return dict(zip(self.shapes, _positions[key], strict=True))

    def _find_positions(self, first: int, last: int) -> list[Tensor]:
        # transformers converts numbers that count the stored ones, so its result says where each number came from.
        start = 0
        named = []
        for piece in self._pieces(first, last):
            named.append((piece.pattern, torch.arange(start, start + piece.size).view(piece.shape)))
            start += piece.size
        positions = convert(self.converter, self.key, named, self.model)
        return [positions[name].contiguous() for name in self.shapes]

    @property
    def kind(self) -> tuple[str, ...]:
        """A key that is equal for groups with the same conversion, such as the same stack of another block."""
        return re.sub(r"\d+", "*", self.key), str(self.converter), str(list(self.shapes.values()))


@dataclass(frozen=True)
class _Piece:
    pattern: str
    stored: Stored
    rows: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows[1] - self.rows[0], *self.stored.shape[1:])

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def convert(
    converter: Any, key: str, tensors: Sequence[tuple[str, Tensor]], model: Any
) -> dict[str, Tensor]:
    fresh = copy.deepcopy(converter)
    for pattern, tensor in tensors:
        fresh.add_tensor(key, key, pattern, tensor)
    converted = fresh.convert(key, model=model, config=model.config)
    return {
        name: value[0] if isinstance(value, list) else value for name, value in converted.items()
    }


_positions: dict[tuple[str, ...], list[Tensor]] = {}


def _within_experts(operations: Sequence[Any]) -> bool:
    """True if these operations of transformers do not mix experts: they leave the first dimension alone."""
    for operation in operations:
        if type(operation).__name__ not in ("Concatenate", "Transpose", "Chunk", "Interleave"):
            return False
        if getattr(operation, "check_dims", False):
            return False
        if min(getattr(operation, name, 1) for name in ("dim", "dim0", "dim1")) < 1:
            return False
    return True


# The stored tensors of a model folder that hold an adapted layer, found by transformers' own rules for reading them.


_HEADS = ("lm_head", "embed_out")
_LEAVE_OUT = "leave it out of adapter.targets"


def groups(base: Path, model: "PreTrainedModel", layers: Iterable[str]) -> list[Group]:
    """Return the groups of stored tensors that hold these layers; raises UserError if one cannot be merged."""
    group_list, problems = find(base, model, layers)
    for layer, problem in problems.items():
        raise UserError(f"cannot merge {layer}: {problem}")
    return group_list


def find(
    base: Path, model: "PreTrainedModel", layers: Iterable[str]
) -> tuple[list[Group], dict[str, str]]:
    """Return the groups of stored tensors that hold these layers, and layer -> reason if one cannot be merged."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A stack of experts has the name of its parameter, a linear layer that of its module.
    wanted = {layer if layer in parameters else f"{layer}.weight": layer for layer in layers}
    stored = tensors(base)
    problems = _tied(model, parameters, wanted)
    read_from = as_transformers_reads(stored, model)
    by_tensor: dict[str, Group] = {}
    problem_of_kind = {}
    for parameter, layer in wanted.items():
        if layer in problems:
            continue
        try:
            group = read_from.get(parameter) or _by_suffix(parameter, stored, base, model)
            first = by_tensor.setdefault(group.stored[0].name, group)
            _check(first, parameter, group)
            if group.kind not in problem_of_kind:
                problem_of_kind[group.kind] = group.problem()
            problem = problem_of_kind[group.kind]
            name = group.stored[0].name
            if problem:
                raise UserError(f"{problem} ({name}, ...)")
            by_tensor[name] = replace(first, layers={**first.layers, layer: parameter})
        except UserError as error:
            problems[layer] = str(error)
    return [group for group in by_tensor.values() if group.layers], problems


def _tied(
    model: "PreTrainedModel", parameters: Mapping[str, Tensor], wanted: Mapping[str, str]
) -> dict[str, str]:
    # A tied weight has no change of its own: merging the adapter would change the other layer as well.
    owners = Counter(id(parameter) for parameter in parameters.values())
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return {
        layer: f"its weight is tied to another layer; {_LEAVE_OUT}"
        for name, layer in wanted.items()
        if (name in parameters and owners[id(parameters[name])] > 1)
        or (tied and layer.rpartition(".")[2] in _HEADS)
    }


def as_transformers_reads(
    places: Mapping[str, Stored], model: "PreTrainedModel"
) -> dict[str, Group]:
    return follow(places, model)[0]


def follow(
    stored: Mapping[str, Stored], model: "PreTrainedModel"
) -> tuple[dict[str, Group], dict[str, str]]:
    """Return parameter -> the group it is read from, and unused tensor -> its name in the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern: dict[str, Any] = {}
    for converter in converters:
        by_pattern |= dict.fromkeys(converter.source_patterns, converter)
    known = model.state_dict()
    prefix = model.base_model_prefix
    parts: dict[str, dict[str | None, list[Stored]]] = {}
    unread = {}
    for name in sorted(stored, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, known)
        # Some renamings of transformers match names that the model already has.
        if key not in known and name in known:
            key, pattern = rename_source_key(name, [], [], prefix, known)
        if key in known:
            parts.setdefault(key, {}).setdefault(pattern, []).append(stored[name])
        else:
            unread[name] = key
    group_of = {}
    for key, part in parts.items():
        group = _group(key, part, by_pattern, model)
        group_of.update(dict.fromkeys(group.shapes, group))
    return group_of, unread


def _group(
    key: str,
    part: Mapping[str | None, list[Stored]],
    by_pattern: Mapping[str, Any],
    model: "PreTrainedModel",
) -> Group:
    named = {pattern or key: tuple(entries) for pattern, entries in part.items()}
    converters = [by_pattern[pattern] for pattern in part if pattern is not None]
    if not converters:
        return Group(named, key, {key: named[key][0].shape}, None, model, {})
    whole = []
    for pattern, entries in named.items():
        whole += [(pattern, torch.empty(entry.shape, device="meta")) for entry in entries]
    try:
        converted = convert(converters[0], key, whole, model)
        shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    except Exception:
        # transformers' operations failed, so the shapes are not known; _check refuses the layer.
        shapes = {key: ()}
    return Group(named, key, shapes, converters[0], model, {})


def _by_suffix(
    parameter: str, stored: Mapping[str, Stored], base: Path, model: "PreTrainedModel"
) -> Group:
    # A file may have the names without the model's prefix, or with another prefix.
    parts = parameter.split(".")
    shorter = [".".join(parts[i:]) for i in range(1, len(parts) - 1)]
    matches = [name for name in shorter if name in stored]
    matches += [name for name in stored if name.endswith("." + parameter)]
    if len(matches) > 1:
        raise UserError(f"{base} has its weight twice, as {matches[0]} and {matches[1]}")
    if not matches:
        raise UserError(
            f"{base} has no weight {parameter}, and it is not known from which tensors transformers builds it;"
            f" {_LEAVE_OUT}"
        )
    entry = stored[matches[0]]
    return Group({parameter: (entry,)}, parameter, {parameter: entry.shape}, None, model, {})


def _check(first: Group, parameter: str, group: Group) -> None:
    names = [entry.name for entry in group.stored]
    if first.key != group.key:
        raise UserError(f"its weight is tied to another layer; {_LEAVE_OUT}")
    if group.converter is None and len(names) > 1:
        raise UserError(f"its weight is stored twice, as {names[0]} and {names[1]}; {_LEAVE_OUT}")
    odd = group.odd
    if odd:
        raise UserError(
            f"{odd.name} is stored as {odd.dtype}, which a merge cannot change; use a base model in bfloat16, float16"
            " or float32"
        )
    if len({entry.dtype for entry in group.stored}) > 1:
        raise UserError(
            f"its parts are stored in several precisions ({names[0]}, ...); {_LEAVE_OUT}"
        )
    own = tuple(group.model.get_parameter(parameter).shape)
    if not group.shapes.get(parameter):
        raise UserError(
            f"it is not known how transformers converts its tensors ({names[0]}, ...); {_LEAVE_OUT}"
        )
    if group.shapes[parameter] != own:
        raise UserError(
            f"{names[0]} has the shape {group.shapes[parameter]}, config.json says {own}"
        )


# The check of a model folder: do its stored tensors fit the model that its config describes?


@dataclass(frozen=True)
class Fit:
    """The differences between a folder's tensors and its config."""

    problem: str | None
    """The difference between model and files, to follow "FOLDER "; None if none is known."""
    left_out: tuple[str, ...]
    """Tensors that the model does not use, such as layers that predict further tokens, or a vision part."""

    def warning(self, model: Any, files: str) -> str:
        return (
            f"model.name: {type(model).__name__} does not use {plural(len(self.left_out), 'tensor')} in the files of"
            f" {files}, so they are ignored: {some(self.left_out)}"
        )


def fit(folder: Path, model: "PreTrainedModel") -> Fit:
    """Compare the folder's headers with the model without weights; a quantised model is not compared."""
    if getattr(model.config, "quantization_config", None) is not None:
        return Fit(None, ())
    try:
        stored = tensors(folder)
        groups, unread = follow(stored, model)
    except (UserError, AttributeError, ImportError, KeyError, TypeError):
        # Loading the model will name the problem.
        return Fit(None, ())
    # transformers leaves these out with good reason (PreTrainedModel._adjust_missing_and_unexpected_keys).
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    ignored = re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)))
    left_out = {name: key for name, key in unread.items() if not ignored.search(key)}
    for name, parameter in model.named_parameters():
        odd = groups[name].odd if name in groups else None
        if odd and parameter.is_floating_point():
            return Fit(unsupported_packing(odd.name, odd.dtype), tuple(left_out))
    problem = _missing(groups, model)
    if problem is None:
        # transformers would silently drop a bias that the config does not have. One of zeros changes nothing.
        for name, key in left_out.items():
            entry = stored[name]
            known = is_unknown_bias(model, key) and entry.dtype in DTYPES
            if known and bool(entry.read(folder).any()):
                problem = unsupported_bias(model, name)
                break
    return Fit(problem, tuple(left_out))


def _missing(groups: Mapping[str, Group], model: Any) -> str | None:
    if any(
        group.converter is not None and () in group.shapes.values() for group in groups.values()
    ):
        return None  # the parameters of a conversion that cannot be followed are not known
    present = {
        id(tensor)
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if name in groups
    }
    not_needed = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["$^"]))
    for name, parameter in model.named_parameters():
        if (
            id(parameter) not in present
            and name not in model.all_tied_weights_keys
            and not not_needed.search(name)
        ):
            return (
                f"has no weight {name}, which {type(model).__name__} needs by its config.json: download the model's"
                " files again, or correct config.json"
            )
    return None
