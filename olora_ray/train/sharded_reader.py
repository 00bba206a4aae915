"""Parameters of a base, read from its files by rows: a worker of a sharded base reads its own rows only.

The values are those that `from_pretrained` would load, name by name (model/stored.py), in the precision of the model.
Where this cannot be guaranteed, `find` returns the reason, and the caller loads the whole base.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from olora_ray.common.errors import UserError, first_line
from olora_ray.model import stored
from olora_ray.model.folder import INDEX, SINGLE
from olora_ray.model.load import stored_buffers
from olora_ray.model.stored import Group, as_transformers_reads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseFiles:
    """Location of a model's parameters and stored buffers in the files of its folder."""

    folder: Path
    groups: Mapping[str, Group]
    """Entries by the name of a parameter or buffer; a shared tensor has one under each of its names."""
    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, tuple[int, ...]]
    names: Mapping[str, str]
    """Name in the model -> name in the files; they differ for a shared tensor that is stored under another name."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first..last in the model's dtype; raises UserError if the file is cut off."""
        own = self.names[name]
        return self.groups[own].take(self.folder, own, first, last, self.dtypes[own])

    def mapped(self, name: str) -> Tensor | None:
        """Return a parameter as memory-mapped pages of its file; None if its stored form differs from the model's.

        Do not write to the result: each written page would take memory of its own.
        """
        own = self.names[name]
        group = self.groups[own]
        if group.converter is not None or group.dtype != self.dtypes[own]:
            return None
        return group.stored[0].mapped(self.folder)

    def in_parts(self, name: str) -> bool:
        return self.groups[self.names[name]].in_parts

    def whole(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.rows(name, 0, shape[0] if shape else 1)


@torch.no_grad()
def fill(
    model: nn.Module,
    files: BaseFiles,
    wanted: Callable[[nn.Parameter], bool],
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Fill the wanted weights and all stored buffers of a model on the meta device; shared weights stay shared.

    `read` maps a name to its weight; by default it reads the files.
    """
    read = read or files.whole
    own: dict[int, nn.Parameter] = {}
    # The list keeps the replaced parameters alive. Otherwise Python could give the id of one to another parameter.
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if wanted(parameter):
            if id(parameter) not in own:
                own[id(parameter)] = nn.Parameter(read(name), requires_grad=False)
            _owner(model, name)._parameters[name.rpartition(".")[2]] = own[id(parameter)]
    for name in stored_buffers(model):
        _owner(model, name)._buffers[name.rpartition(".")[2]] = files.whole(name)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def find(folder: Path, model: "PreTrainedModel") -> BaseFiles | str:
    """Return the files of a model that is still on the meta device, or the reason why they cannot be read by rows."""
    problem = _not_plain(folder, model)
    if problem:
        return problem
    tensors: dict[str, Tensor] = dict(
        model.named_parameters(remove_duplicate=False)
    ) | stored_buffers(model)
    try:
        groups = as_transformers_reads(stored.tensors(folder), model)
    # Another version of transformers may convert names in a way that as_transformers_reads does not know.
    except (UserError, AttributeError, ImportError, KeyError, TypeError) as error:
        return f"the names in its files do not fit the model ({type(error).__name__}: {first_line(error)})"
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    names: dict[str, str] = {}
    for alike in names_of.values():
        stored_names = [name for name in alike if name in groups]
        if not stored_names:
            return f"{alike[0]} is missing in its files"
        # from_pretrained compares their values, and does not share two weights whose values differ.
        if stored_names[1:]:
            return f"the model shares {stored_names[0]} and {stored_names[1]}, but both are stored"
        name = stored_names[0]
        names.update(dict.fromkeys(alike, name))
        problem = _unreadable(groups[name], name, tensors[name])
        if problem:
            return f"{name} {problem}"
    return BaseFiles(
        folder,
        groups,
        {name: tensor.dtype for name, tensor in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        names,
    )


def _not_plain(folder: Path, model: Any) -> str | None:
    if not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is not part of transformers"
    if getattr(model.config, "quantization_config", None) is not None:
        return "its files are quantised"
    if getattr(model.config, "transformers_weights", None) or getattr(
        type(model.config), "extra_files", None
    ):
        return "its config.json names additional weight files"
    if (folder / INDEX).exists() and (folder / SINGLE).exists():
        return f"its folder has both {SINGLE} and {INDEX}"
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda dtype: {})(model.dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for pattern, dtype in plan.items():
            if tensor.dtype != dtype and re.search(pattern.replace("*", ".*"), name):
                return f"transformers keeps {name} in {str(dtype).removeprefix('torch.')}"
    return None


def _unreadable(group: Group, name: str, tensor: Tensor) -> str | None:
    entries = group.stored
    if group.converter is None and len(entries) > 1:
        return f"is stored twice, as {entries[0].name} and {entries[1].name}"
    if group.odd:
        return f"is stored as {group.odd.dtype}, which cannot be read by rows"
    if group.shapes.get(name) != tuple(tensor.shape):
        return f"is not stored in the model's shape {tuple(tensor.shape)}"
    if not isinstance(tensor, nn.Parameter) and group.converter is not None:
        return "is a buffer that has to be converted"
    return None


# The blocks of a model: the decoder layers of its language model, and all modules that FSDP shards one by one.


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the language model in order: the longest ModuleList that is not inside another."""
    # Only outermost lists count, because a list of experts inside a block may be longer than the list of blocks. The
    # search starts at the decoder, because an image tower beside it may have more blocks.
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    lists: list[nn.ModuleList] = []
    waiting: list[nn.Module] = [decoder if isinstance(decoder, nn.Module) else model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, nn.ModuleList):
            lists.append(module)
        else:
            waiting.extend(module.children())
    return list(max(lists, key=len, default=[]))


def blocks_to_shard(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP gathers one at a time: those that the model lists in `_no_split_modules`.

    If the list is missing, or does not separate the blocks of the language model, only these blocks are returned. A
    module that shares a weight with a module outside it, such as an embedding with the head, is not sharded.
    """
    layers = decoder_layers(model)
    classes: Any = getattr(model, "_no_split_modules", None) or ()
    named: list[nn.Module] = []
    held = 0
    waiting = list(model.children())[::-1]
    while waiting:
        module = waiting.pop()
        if type(module).__name__ not in classes:
            waiting.extend(list(module.children())[::-1])
        elif _is_closed(model, module):
            parts = {id(part) for part in module.modules()}
            inside = sum(id(layer) in parts for layer in layers)
            if inside > 1:
                return layers
            named.append(module)
            held += inside
    return named if held == len(layers) else layers


def _is_closed(model: nn.Module, module: nn.Module) -> bool:
    own = {id(parameter) for parameter in module.parameters()}
    inside = {id(part) for part in module.modules()}
    for part in model.modules():
        if id(part) not in inside and any(id(each) in own for each in part.parameters(False)):
            return False
    return bool(own)
