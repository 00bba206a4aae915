"""Which stored tensors of a model folder hold an adapted layer, as transformers itself reads them.

The names in the files are followed as `from_pretrained` does (transformers.core_model_loading): renamed, with or
without the prefix of the headless model, put together from several tensors or split. Where its rules say nothing, a
name that ends alike is taken if there is only one. Needs the headers of the files and the model without weights.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from olora_ray.adapter import stored
from olora_ray.adapter.layout import parameter_of
from olora_ray.adapter.stored import DTYPES, Stored
from olora_ray.adapter.weight_group import Group, convert
from olora_ray.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    places, problems = stored.tensors(base), _tied(model, wanted)
    read = as_transformers_reads(places, model)
    found: dict[str, Group] = {}
    for parameter, layer in wanted.items():
        if layer in problems:
            continue
        try:
            group = read.get(parameter) or _by_suffix(parameter, layer, places, base, model)
            first = found.setdefault(group.stored[0].name, group)
            _check(first, layer, parameter, group)
            found[group.stored[0].name] = _with_layer(first, layer, parameter)
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


def _by_suffix(parameter: str, layer: str, places: Mapping[str, Stored], base: Path, model: "PreTrainedModel") -> Group:
    """The one stored tensor whose name ends like the parameter's; raises UserError if there is none, or two."""
    parts = parameter.split(".")
    shorter = [".".join(parts[i:]) for i in range(1, len(parts) - 1)]
    found = [name for name in shorter if name in places]
    found += [name for name in places if name.endswith("." + parameter)]
    if len(found) > 1:
        raise UserError(f"{base} has its weight twice, as {found[0]} and {found[1]}")
    if not found:
        raise UserError(
            f"{base} has no weight {parameter}; a weight that is tied or stored under another name cannot be merged:"
            f" {_LEAVE_OUT}"
        )
    entry = places[found[0]]
    return Group({parameter: (entry,)}, parameter, {parameter: entry.shape}, None, model, {})


def _check(first: Group, layer: str, parameter: str, group: Group) -> None:
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
    if problem := group.problem():
        raise UserError(f"{problem} ({names[0]}, ...)")


def _with_layer(group: Group, layer: str, parameter: str) -> Group:
    return Group(group.parts, group.key, group.shapes, group.converter, group.model, {**group.layers, layer: parameter})
