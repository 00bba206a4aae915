"""The stored tensors of a model folder: where each one lies, and reading and writing some of its rows.

Plain reads and writes at byte offsets: memory holds what was asked for; only `mapped` maps, and one tensor.
"""

import copy
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

from olora_ray.adapter.candidates import parameter_of
from olora_ray.common.errors import UserError
from olora_ray.model.folder import INDEX, SINGLE, indexed, is_unknown_bias, unsupported_bias, unsupported_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    files = [SINGLE] if (folder / SINGLE).is_file() else indexed(folder) or [SINGLE]
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(f"{folder}: no {missing[0]}; merging needs the base model's weights as safetensors")
    return files


def is_stale_index(folder: Path, name: str) -> bool:
    """Whether a file of the folder is an index of other files than those that are read."""
    return name == INDEX and (folder / SINGLE).is_file() and indexed(folder) not in ([], [SINGLE])


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


# Stored tensors and the parameters that transformers makes of them, both ways.


AT_ONCE = 2**23
"""Numbers of a stack of experts that are in memory together, unless one expert has more."""


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
        first, last = 0, self._rows if self._way == "whole" else 1
        size = sum(piece.size for piece in self._pieces(first, last))
        if size > 2**27:  # it cannot be taken in parts, and takes too much memory to be tried
            return None
        try:
            found = torch.cat([place.reshape(-1) for place in self._find_places(first, last)])
        except Exception as error:  # of transformers' operations, whatever they meet
            return f"transformers' conversion of its stored tensors cannot be followed ({type(error).__name__})"
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
        kind = (*self.kind, str(last - first))
        if kind not in _places:
            found = self._find_places(first, last)
            if len(_places) > 1:  # blocks of a model repeat two kinds of stacks
                del _places[next(iter(_places))]
            _places[kind] = found
        return dict(zip(self.shapes, _places[kind], strict=True))

    def _find_places(self, first: int, last: int) -> list[Tensor]:
        start, named = 0, []
        for piece in self._pieces(first, last):
            named.append((piece.pattern, torch.arange(start, start + piece.size).view(piece.shape)))
            start += piece.size
        found = convert(self.converter, self.key, named, self.model)
        return [found[name].contiguous() for name in self.shapes]

    @property
    def kind(self) -> tuple[str, ...]:
        """The same for groups whose numbers are moved alike: those of other blocks."""
        return re.sub(r"\d+", "*", self.key), str(self.converter), str(list(self.shapes.values()))


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


_places: dict[tuple[str, ...], list[Tensor]] = {}


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


# Which stored tensors of a model folder hold an adapted layer, as transformers itself reads them.


_HEADS = ("lm_head", "embed_out")
_LEAVE_OUT = "leave it out of adapter.targets"


def groups(base: Path, model: "PreTrainedModel", layers: Iterable[str]) -> list[Group]:
    """The groups of stored tensors that hold these layers; raises UserError if one cannot be merged."""
    found, problems = find(base, model, layers)
    for layer, problem in problems.items():
        raise UserError(f"cannot merge {layer}: {problem}")
    return found


def find(base: Path, model: "PreTrainedModel", layers: Iterable[str]) -> tuple[list[Group], dict[str, str]]:
    """The groups of stored tensors that hold these layers, and why layers that are in none cannot be merged."""
    wanted = {parameter_of(model, layer): layer for layer in layers}
    places, problems = tensors(base), _tied(model, wanted)
    read = as_transformers_reads(places, model)
    found: dict[str, Group] = {}
    tried: dict[tuple[str, ...], str | None] = {}
    for parameter, layer in wanted.items():
        if layer in problems:
            continue
        try:
            group = read.get(parameter) or _by_suffix(parameter, places, base, model)
            first = found.setdefault(group.stored[0].name, group)
            _check(first, parameter, group)
            if group.kind not in tried:
                tried[group.kind] = group.problem()
            if problem := tried[group.kind]:
                raise UserError(f"{problem} ({group.stored[0].name}, ...)")
            found[group.stored[0].name] = replace(first, layers={**first.layers, layer: parameter})
        except UserError as error:
            problems[layer] = str(error)
    return [group for group in found.values() if group.layers], problems


def _tied(model: "PreTrainedModel", wanted: Mapping[str, str]) -> dict[str, str]:
    """Layers whose parameter is another layer's as well."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = Counter(id(parameter) for parameter in parameters.values())
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return {
        layer: f"its weight is tied to another layer; {_LEAVE_OUT}"
        for name, layer in wanted.items()
        if (name in parameters and owners[id(parameters[name])] > 1) or (tied and layer.rpartition(".")[2] in _HEADS)
    }


def as_transformers_reads(places: Mapping[str, Stored], model: "PreTrainedModel") -> dict[str, Group]:
    """Parameter -> the group that it is read from."""
    return follow(places, model)[0]


def follow(places: Mapping[str, Stored], model: "PreTrainedModel") -> tuple[dict[str, Group], dict[str, str]]:
    """Parameter -> the group that it is read from; and of the tensors that nothing is read from the names they get."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    parts: dict[str, dict[str | None, list[Stored]]] = {}
    unread: dict[str, str] = {}
    for name in sorted(places, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if key not in known and name in known:  # it should not have been renamed
            key, pattern = rename_source_key(name, [], [], prefix, known)
        if key in known:
            parts.setdefault(key, {}).setdefault(pattern, []).append(places[name])
        else:
            unread[name] = key
    found: dict[str, Group] = {}
    for key, part in parts.items():
        group = _group(key, part, by_pattern, model)
        found.update(dict.fromkeys(group.shapes, group))
    return found, unread


def _group(
    key: str, part: Mapping[str | None, list[Stored]], by_pattern: Mapping[str, Any], model: "PreTrainedModel"
) -> Group:
    named = {pattern or key: tuple(entries) for pattern, entries in part.items()}
    converters = [by_pattern[pattern] for pattern in part if pattern is not None]
    if not converters:
        return Group(named, key, {key: named[key][0].shape}, None, model, {})
    whole = [
        (pattern, torch.empty(entry.shape, device="meta")) for pattern, entries in named.items() for entry in entries
    ]
    try:
        shapes = {name: tuple(found.shape) for name, found in convert(converters[0], key, whole, model).items()}
    except Exception:  # of transformers' operations: what it would make of them is not known
        shapes = {key: ()}
    return Group(named, key, shapes, converters[0], model, {})


def _by_suffix(parameter: str, places: Mapping[str, Stored], base: Path, model: "PreTrainedModel") -> Group:
    """The one stored tensor whose name ends like the parameter's; raises UserError if there is none, or two."""
    parts = parameter.split(".")
    shorter = [".".join(parts[i:]) for i in range(1, len(parts) - 1)]
    found = [name for name in shorter if name in places]
    found += [name for name in places if name.endswith("." + parameter)]
    if len(found) > 1:
        raise UserError(f"{base} has its weight twice, as {found[0]} and {found[1]}")
    if not found:
        raise UserError(
            f"{base} has no weight {parameter}; what transformers makes it of is not known before it is loaded;"
            f" {_LEAVE_OUT}"
        )
    entry = places[found[0]]
    return Group({parameter: (entry,)}, parameter, {parameter: entry.shape}, None, model, {})


def _check(first: Group, parameter: str, group: Group) -> None:
    """Raise UserError for a layer whose change cannot be written into the stored tensors of its group."""
    names = [entry.name for entry in group.stored]
    if first.key != group.key:
        raise UserError(f"its weight is tied to another layer; {_LEAVE_OUT}")
    if group.converter is None and len(names) > 1:
        raise UserError(f"its weight is stored twice, as {names[0]} and {names[1]}")
    for entry in group.stored:
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.name} is stored as {entry.dtype}, which is not a floating-point weight; use a base"
                " in bfloat16, float16 or float32"
            )
    if len({entry.dtype for entry in group.stored}) > 1:
        raise UserError(f"its parts are stored in several precisions ({names[0]}, ...); {_LEAVE_OUT}")
    own = tuple(group.model.get_parameter(parameter).shape)
    if not group.shapes.get(parameter):
        raise UserError(f"transformers' conversion of its stored tensors ({names[0]}, ...) cannot be followed")
    if group.shapes[parameter] != own:
        raise UserError(f"it is stored as {names[0]} of shape {group.shapes[parameter]}, the model's is {own}")


# Whether the stored tensors of a model folder are those of the model that its config describes.


@dataclass(frozen=True)
class Fit:
    """What of a folder's tensors does not fit its config."""

    problem: str | None
    """Why the model would be another than the files hold, to follow "FOLDER "; None if that is not known."""
    left_out: tuple[str, ...]
    """Tensors that the model has no place for: of layers that predict further tokens, of a part that sees."""


def fit(folder: Path, model: "PreTrainedModel") -> Fit:
    """Compare the headers of a folder with the model without weights; of a quantised one nothing is known here."""
    if getattr(model.config, "quantization_config", None) is not None:
        return Fit(None, ())
    try:
        places = tensors(folder)
        groups, unread = follow(places, model)
    except (UserError, AttributeError, ImportError, KeyError, TypeError):  # loading says what is wrong
        return Fit(None, ())
    ignored = _ignored(model)
    left_out = {name: key for name, key in unread.items() if not ignored.search(key)}
    problem = _packed(groups, model) or _missing(groups, model) or _biased(folder, places, left_out, model)
    return Fit(problem, tuple(left_out))


def _ignored(model: Any) -> re.Pattern[str]:
    """Names that transformers leaves out with good reason (PreTrainedModel._adjust_missing_and_unexpected_keys)."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)))


def _packed(groups: Mapping[str, Group], model: "PreTrainedModel") -> str | None:
    for name, parameter in model.named_parameters():
        entries = groups[name].stored if name in groups and parameter.is_floating_point() else []
        if odd := next((entry for entry in entries if entry.dtype not in DTYPES), None):
            return unsupported_packing(odd.name, odd.dtype)
    return None


def _missing(groups: Mapping[str, Group], model: Any) -> str | None:
    if any(group.converter is not None and () in group.shapes.values() for group in groups.values()):
        return None  # what such a conversion makes is not known
    there = {id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False) if name in groups}
    not_needed = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["$^"]))
    for name, parameter in model.named_parameters():
        if id(parameter) not in there and name not in model.all_tied_weights_keys and not not_needed.search(name):
            return (
                f"has no weight {name}, which {type(model).__name__} has by its config.json: get the model's files"
                " anew, or correct config.json"
            )
    return None


def _biased(
    folder: Path, places: Mapping[str, Stored], left_out: Mapping[str, str], model: "PreTrainedModel"
) -> str | None:
    """What is wrong with a bias other than zero of a layer that has none by the config."""
    for name, key in left_out.items():
        entry = places[name]
        if is_unknown_bias(model, key) and entry.dtype in DTYPES and bool(entry.read(folder).any()):
            return unsupported_bias(model, name)
    return None
