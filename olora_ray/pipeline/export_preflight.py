"""Test of the export before step 0: check that the adapter can be exported, without weights of the base model.

Small random adapters stand in for the trained ones. They are written as an adapter folder, and PEFT reads this folder
into the model without weights; then layers and changes are compared as in a real export. For the merge, the test
checks names, precisions and shapes of the stored tensors, and that transformers only moves their numbers.
"""

import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from olora_ray.adapter.candidates import is_stack, parameter_of, stored_transposed
from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.common import node_cache
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.model import stored
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import exporter
from olora_ray.pipeline.parity import BOUND, check_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PASSED = "passed\n"
_STAY_PACKED = ("bitsandbytes", "gptq", "awq")
"""Quantisation methods whose weights transformers keeps packed after loading."""
_RANK = 1
"""Rank of the random adapters. With B0 the folder has two directions, enough to tell their order from the experts'."""


def problems(base: BaseModel, config: Config, targets: Iterable[str]) -> list[str]:
    """Return one line per type of layer that can be trained but not exported, with the setting to change."""
    lines = _of_adapter(base, config, list(targets))
    if config.export.also and not lines:
        lines = [*exporter.problems(base, skeleton(base, config.model), config)]
    return lines


def _of_adapter(base: BaseModel, config: Config, names: Sequence[str]) -> list[str]:
    # `names` are the full names of the layers to adapt. A result without problems is cached on this node.
    tried = (base, config.model, config.adapter, config.export.merged)
    entry = node_cache.result_path("export-trials", *map(repr, tried), *names)
    if base.digest and node_cache.read(entry) == _PASSED:
        return []
    folder = Path(base.folder)
    model = skeleton(base, config.model)
    lines = _packed(folder, model, names)
    if not lines:
        lines = _unreadable(model, config, names)
        if config.export.merged:
            lines += _unmergeable(folder, model, names)
    if base.digest and not lines:
        node_cache.keep(entry, _PASSED)
    return lines


def _packed(folder: Path, model: "PreTrainedModel", names: Sequence[str]) -> list[str]:
    # Without this check the workers would fail on these layers, after Ray has started and the tokens are prepared.
    settings: Any = getattr(model.config, "quantization_config", None)
    method = getattr(settings, "quant_method", None)
    if isinstance(settings, dict):
        method = settings.get("quant_method")
    method_name = str(getattr(method, "value", method))
    if method_name not in _STAY_PACKED:
        return []
    try:
        tensors = stored.tensors(folder)
    except UserError:  # loading the model reports this problem
        return []
    read = stored.as_transformers_reads(tensors, model)
    for name in names:
        group = read.get(parameter_of(model, name))
        if group is None or group.odd:
            return [
                f"model.name: {folder} is quantised ({method_name}): {name} has no floating-point weights;"
                " use the original model, and set model.quantization to save memory"
            ]
    return []


def _unmergeable(folder: Path, model: "PreTrainedModel", names: Sequence[str]) -> list[str]:
    try:
        _, refused = stored.find(folder, model, names)
    except UserError as error:
        return [f"export: {error}; or set export.merged: false"]
    lines: dict[tuple[str, str], str] = {}
    for name, why in refused.items():
        lines.setdefault(
            (generic(name), generic(why)), f"adapter.targets: {name} cannot be merged: {why}"
        )
    return [f"{line}; or set export.merged: false" for line in lines.values()]


def _unreadable(model: "PreTrainedModel", config: Config, names: Sequence[str]) -> list[str]:
    # All linear layers, and of each type of expert stack the first and the last, because stacks are large. PEFT wraps a
    # module for all of its stacks together.
    stacks = {name: name.rpartition(".")[0] for name in names if is_stack(model, name)}
    modules = {stacks[name] for name in _ends(stacks)}
    chosen = [name for name in names if name not in stacks or stacks[name] in modules]
    adapter = {name: _stand_in(model, name, number) for number, name in enumerate(chosen)}
    settings = config.adapter.model_copy(update={"rank": _RANK})
    with tempfile.TemporaryDirectory(prefix="olora-trial-") as temporary:
        folder = Path(temporary) / "adapter"
        write_adapter(adapter, settings, "base", folder, model)
        report = check_adapter(folder, model, adapter, settings.scale(), _ends(chosen))
    if report.ok:
        return []
    if not report.problems:
        return [
            f"adapter.targets: PEFT computes another change of {report.layer} (relative error {report.error:.2g}, limit"
            f" {BOUND:g}); leave {_last(report.layer)} out of adapter.targets"
        ]
    lines = []
    for line in report.problems:
        words = set(re.split(r"[^\w.]+", line))
        blamed = sorted({_last(name) for name in chosen if {name, _last(name)} & words})
        remedy = "name other layers in adapter.targets"
        if blamed:
            remedy = f"leave {' and '.join(blamed)} out of adapter.targets"
        lines.append(f"adapter.targets: the adapter could not be exported: {line}; {remedy}")
    return lines


def _ends(names: Iterable[str]) -> list[str]:
    types: dict[str, list[str]] = {}
    for name in names:
        types.setdefault(generic(name), []).append(name)
    ends: list[str] = []
    for members in types.values():
        ends += dict.fromkeys([members[0], members[-1]])
    return ends


def generic(name: str) -> str:
    """Return the name with * for each number: layers of one type have the same result."""
    return re.sub(r"\d+", "*", name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _stand_in(model: "PreTrainedModel", name: str, seed: int) -> AdapterWeights:
    *experts, m, n = model.get_parameter(parameter_of(model, name)).shape
    if stored_transposed(model, name):
        m, n = n, m
    generator = torch.Generator().manual_seed(seed)
    a0, b0, da, db = (
        torch.randn(*experts, *shape, generator=generator)
        for shape in ((_RANK, n), (m, _RANK), (_RANK, n), (m, _RANK))
    )
    return AdapterWeights(Factors(a0, b0), da, db)
