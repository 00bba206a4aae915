"""The export tried before step 0: whether what will be trained can be delivered. Needs no weights of the base.

Small random adapters stand in for the trained ones. They are written as the adapter folder and read by PEFT on the
model without weights; layers and changes are compared as those of a real export are. Of the merge, the names,
precisions and shapes of the stored tensors are looked at, and whether transformers only moves their numbers.
"""

import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from olora_ray.adapter import stored
from olora_ray.adapter.candidates import is_stack, parameter_of, stored_transposed
from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.adapter.parity import BOUND, check_adapter
from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.common import node_cache
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PASSED = "passed\n"
_STAY_PACKED = ("bitsandbytes", "gptq", "awq")
"""Ways in which a model's files are quantised that transformers does not undo as it loads them."""
_RANK = 1
"""With B0 the folder has two directions, which is enough to tell their order from that of experts."""


def problems(base: BaseModel, config: Config, targets: Iterable[str]) -> list[str]:
    """One line for each kind of layer that could be trained and not be exported, and what to set instead.

    `targets` are the full names of the layers that adapters are to be put in. That there are none is kept on this node.
    """
    names = list(targets)
    place = node_cache.place("export-trials", *map(repr, (base, config.model, config.adapter, config.export)), *names)
    if base.digest and node_cache.read(place) == _PASSED:
        return []
    found = _found(base, config, names)
    if base.digest and not found:
        node_cache.keep(place, _PASSED)
    return found


def _found(base: BaseModel, config: Config, names: Sequence[str]) -> list[str]:
    model = skeleton(base, config.model)
    if packed := _packed(Path(base.folder), model, names):
        return packed
    found = _unreadable(model, config, names)
    if config.export.merged:
        found += _unmergeable(Path(base.folder), model, names)
    return found


def _packed(folder: Path, model: "PreTrainedModel", names: Sequence[str]) -> list[str]:
    """Layers of a quantised base that have no weight an adapter could be made for: a worker would find them so."""
    settings: Any = getattr(model.config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    kind = str(getattr(method, "value", method))
    if kind not in _STAY_PACKED:
        return []
    try:
        places = stored.tensors(folder)
    except UserError:  # loading says what is wrong
        return []
    read = stored.as_transformers_reads(places, model)
    for name in names:
        group = read.get(parameter_of(model, name))
        if group is None or any(entry.dtype not in stored.DTYPES for entry in group.stored):
            return [
                f"model.name: {folder} is quantised ({kind}): {name} has no floating-point weight, which adapters are"
                " made for; name the model that it was made from, and set model.quantization to keep that packed"
            ]
    return []


def _unmergeable(folder: Path, model: "PreTrainedModel", names: Sequence[str]) -> list[str]:
    try:
        _, refused = stored.find(folder, model, names)
    except UserError as error:
        return [f"export: {error}; or set export.merged: false"]
    lines: dict[tuple[str, str], str] = {}
    for name, why in refused.items():
        lines.setdefault((kind(name), kind(why)), f"adapter.targets: {name} cannot be merged: {why}")
    return [f"{line}; or set export.merged: false" for line in lines.values()]


def _unreadable(model: "PreTrainedModel", config: Config, names: Sequence[str]) -> list[str]:
    """What PEFT would not read as it was trained."""
    chosen = _chosen(model, names)
    adapter = {name: _stand_in(model, name, number) for number, name in enumerate(chosen)}
    settings = config.adapter.model_copy(update={"rank": _RANK})
    with tempfile.TemporaryDirectory(prefix="olora-trial-") as temporary:
        folder = Path(temporary) / "adapter"
        write_adapter(adapter, settings, "base", folder, model)
        found = check_adapter(folder, model, adapter, settings.scale(), _ends(chosen))
    if found.ok:
        return []
    if not found.problems:
        return [
            f"adapter.targets: PEFT computes another change of {found.layer}, off by {found.error:.2g} of its size"
            f" instead of {BOUND:g}; leave {_last(found.layer)} out of adapter.targets"
        ]
    return [
        f"adapter.targets: the adapter could not be exported: {line}; {_remedy(line, chosen)}"
        for line in found.problems
    ]


def _remedy(line: str, names: Sequence[str]) -> str:
    """What to set instead: targets without those that the line names."""
    words = set(re.split(r"[^\w.]+", line))
    blamed = sorted({_last(name) for name in names if {name, _last(name)} & words})
    return f"leave {' and '.join(blamed)} out of adapter.targets" if blamed else "name other layers in adapter.targets"


def _chosen(model: "PreTrainedModel", names: Sequence[str]) -> list[str]:
    """All linear layers, and of the stacks, which are large, the first and the last of each kind."""
    stacks = {name: name.rpartition(".")[0] for name in names if is_stack(model, name)}
    modules = {stacks[name] for name in _ends(stacks)}  # PEFT wraps a module for all of its stacks together
    return [name for name in names if name not in stacks or stacks[name] in modules]


def _ends(names: Iterable[str]) -> list[str]:
    """The first and the last name of each kind."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind(name), []).append(name)
    return list(dict.fromkeys(end for members in kinds.values() for end in (members[0], members[-1])))


def kind(name: str) -> str:
    """The same for layers that differ in numbers only."""
    return re.sub(r"\d+", "*", name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _stand_in(model: "PreTrainedModel", name: str, seed: int) -> AdapterWeights:
    """A random adapter with all four factors."""
    *experts, m, n = model.get_parameter(parameter_of(model, name)).shape
    if stored_transposed(model, name):
        m, n = n, m
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*experts, *shape, generator=generator)

    return AdapterWeights(Factors(draw(_RANK, n), draw(m, _RANK)), draw(_RANK, n), draw(m, _RANK))
