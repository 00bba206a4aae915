"""Parameters of a base read from its files by rows: a worker of a sharded base reads its own rows, and no others.

What is read is what `from_pretrained` would make of the files, name by name (adapter/stored.py), in the
precision of the model. Whatever this cannot promise is said by `problem`, and then the base is to be loaded whole.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from olora_ray.adapter import stored
from olora_ray.adapter.stored import DTYPES, Group, as_transformers_reads
from olora_ray.common.errors import UserError, first_line
from olora_ray.model.folder import INDEX, SINGLE
from olora_ray.model.load import stored_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseFiles:
    """The places of a model's parameters and stored buffers in its folder."""

    folder: Path
    groups: Mapping[str, Group]
    """By all names of parameters and buffers; those that share a tensor are there under each of its names."""
    dtypes: Mapping[str, torch.dtype]
    """In the model."""
    shapes: Mapping[str, tuple[int, ...]]
    """In the model."""
    names: Mapping[str, str]
    """The name under which the files have a tensor, which may be another name of the same."""
    twice: Sequence[tuple[str, str]]
    """Names under which the files have the same tensor, if it is the same: see `differs`."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last of a parameter as the model keeps it; raises UserError for a file that is cut off."""
        return self._rows(self.names[name], first, last)

    def _rows(self, own: str, first: int, last: int) -> Tensor:
        return self.groups[own].take(self.folder, own, first, last, self.dtypes[own])

    def mapped(self, name: str) -> Tensor | None:
        """All of a parameter as the pages of its file, which are read when they are used; None if it is not stored so.

        Not written to: a page that is has its own memory from then on.
        """
        own = self.names[name]
        group = self.groups[own]
        if group.converter is not None or group.dtype != self.dtypes[own]:
            return None
        return group.stored[0].mapped(self.folder)

    def differs(self, part: int, parts: int) -> str | None:
        """Why tensors that the model shares are not the same in the files, as far as this part of their rows tells.

        from_pretrained would not share them then.
        """
        for one, other in self.twice:
            rows = self.shapes[one][0]
            size = max(1, 2**24 // max(1, math.prod(self.shapes[one][1:])))  # rows that are compared at once
            for first in range(part * rows // parts, (part + 1) * rows // parts, size):
                last = min(first + size, (part + 1) * rows // parts)
                if not torch.equal(self._rows(one, first, last), self._rows(other, first, last)):
                    return f"{one} and {other} are one weight, and stored with different values"
        return None

    def in_parts(self, name: str) -> bool:
        """Return True if some rows of a parameter can be read without the others."""
        return self.groups[self.names[name]].in_parts

    def whole(self, name: str) -> Tensor:
        """All of a parameter, or of a stored buffer."""
        shape = self.shapes[name]
        return self.rows(name, 0, shape[0] if shape else 1)


@torch.no_grad()
def fill(
    model: nn.Module,
    files: BaseFiles,
    wanted: Callable[[nn.Parameter], bool],
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Give the wanted weights to a model that has none, and all stored buffers; weights that it shares stay shared.

    They are what `read` makes of their names; by default they are read from the files.
    """
    read = read or files.whole
    own: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):  # all alive: an id is not used again
        if wanted(parameter):
            if id(parameter) not in own:
                own[id(parameter)] = nn.Parameter(read(name), requires_grad=False)
            _owner(model, name)._parameters[name.rpartition(".")[2]] = own[id(parameter)]
    for name in stored_buffers(model):
        _owner(model, name)._buffers[name.rpartition(".")[2]] = files.whole(name)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def find(folder: Path, model: "PreTrainedModel") -> BaseFiles | str:
    """The files of a model that has no weights yet; or why they cannot be read by rows."""
    if problem := _not_plain(folder, model):
        return problem
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False)) | stored_buffers(model)
    try:
        groups = as_transformers_reads(stored.tensors(folder), model)
    except (UserError, AttributeError, ImportError, KeyError, TypeError) as error:  # of another version's conversions
        return f"the names in its files cannot be followed ({type(error).__name__}: {first_line(error)})"
    names: dict[str, str] = {}
    twice: list[tuple[str, str]] = []
    for alike in _alike(tensors):
        there = [name for name in alike if name in groups]
        if not there:
            return f"{alike[0]} is not stored"
        names.update(dict.fromkeys(alike, there[0]))
        twice.extend((there[0], other) for other in there[1:])
        for name in there:
            if problem := _unreadable(groups[name], name, tensors[name]):
                return f"{name} {problem}"
    return BaseFiles(
        folder,
        groups,
        {name: tensor.dtype for name, tensor in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        names,
        twice,
    )


def _not_plain(folder: Path, model: Any) -> str | None:
    """Return why from_pretrained does more than read plain weights into a model of transformers; None if not."""
    if not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is no model of transformers itself"
    if getattr(model.config, "quantization_config", None) is not None:
        return "it is quantised"
    if getattr(model.config, "transformers_weights", None) or getattr(type(model.config), "extra_files", None):
        return "its config names files of weights"
    if (folder / INDEX).exists() and (folder / SINGLE).exists():
        return f"it has {SINGLE} beside {INDEX}"
    return _kept_precise(model)


def _kept_precise(model: Any) -> str | None:
    """Return a weight that from_pretrained keeps in another precision than the empty model, and which; None if none."""
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda dtype: {})(model.dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for pattern, dtype in plan.items():
            if tensor.dtype != dtype and re.search(pattern.replace("*", ".*"), name):
                return f"{name} stays in {str(dtype).removeprefix('torch.')}"
    return None


def _alike(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor."""
    found: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(id(tensor), []).append(name)
    return list(found.values())


def _unreadable(group: Group, name: str, tensor: Tensor) -> str | None:
    """Why rows of a tensor cannot be read; None if they can."""
    entries = group.stored
    if group.converter is None and len(entries) > 1:
        return f"is stored twice, as {entries[0].name} and {entries[1].name}"
    if odd := next((entry for entry in entries if entry.dtype not in DTYPES), None):
        return f"is stored as {odd.dtype}"
    if group.shapes.get(name) != tuple(tensor.shape):
        return f"is stored in another shape than the model's {tuple(tensor.shape)}"
    if not isinstance(tensor, nn.Parameter) and group.converter is not None:
        return "is a buffer that is put together"
    return None


# The blocks of a model: those of its language model, and all that are sharded one by one.


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the language model, in their order: the longest ModuleList that lies in no other.

    Inside of a block there may be longer ones, of experts; beside the language model there may be a tower for images.
    """
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    found: list[nn.ModuleList] = []
    waiting: list[nn.Module] = [decoder if isinstance(decoder, nn.Module) else model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, nn.ModuleList):
            found.append(module)
        else:
            waiting.extend(module.children())
    return list(max(found, key=len, default=[]))


def blocks_to_shard(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: those that the model itself says are not to be split.

    Without such a list, or where it does not tell the blocks of the language model apart, only these. A module that
    shares a weight with another outside of it (an embedding with the head) is left to the whole.
    """
    layers = decoder_layers(model)
    named = [module for module in _outermost(model) if _is_closed(model, module)]
    inside = [{id(part) for part in module.modules()} for module in named]
    held = [sum(id(layer) in parts for layer in layers) for parts in inside]
    return named if sum(held) == len(layers) and max(held, default=0) <= 1 else layers


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of the classes that are not to be split, in the model's order, none in another."""
    classes: Any = getattr(model, "_no_split_modules", None) or ()
    waiting = list(model.children())[::-1]
    while waiting:
        module = waiting.pop()
        if type(module).__name__ in classes:
            yield module
        else:
            waiting.extend(list(module.children())[::-1])


def _is_closed(model: nn.Module, module: nn.Module) -> bool:
    """Return True if the module has weights, and shares none with a module outside of it."""
    own = {id(parameter) for parameter in module.parameters()}
    inside = {id(part) for part in module.modules()}
    outside = (part for part in model.modules() if id(part) not in inside)
    return bool(own) and not any(id(one) in own for part in outside for one in part.parameters(recurse=False))
