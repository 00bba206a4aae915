"""The export tried before step 0: what cannot be delivered is one line then, and nothing else is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from olora_ray.model.source import BaseModel
from olora_ray.pipeline import export_preflight
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL, MIXTURES

Q = "model.layers.0.self_attn.q_proj"


def linear_and_stacks(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not head
    ]
    return linear + [
        name for name, part in model.named_parameters() if part.ndim == 3 and "experts" in name
    ]


def looked(folder: Path, names: list[str], **changes: Any) -> list[str]:
    config = tiny.config(model__name=str(folder), **changes)
    return export_preflight.problems(BaseModel(str(folder), str(folder), ""), config, names)


def tried(folder: Path, model: Any, names: list[str] | None = None) -> list[str]:
    model.save_pretrained(folder)
    return looked(folder, names or linear_and_stacks(model))


@pytest.mark.parametrize("family", [*MIXTURES, "phi3", "gemma3", "llama", "gpt2"])
def test_what_can_be_delivered_is_not_refused(tmp_path: Path, family: str) -> None:
    assert tried(tmp_path, zoo.make(ALL[family])) == []


def test_layers_that_peft_does_not_adapt_are_named_with_what_to_do(tmp_path: Path) -> None:
    model = zoo.make(ALL["mamba"])
    lines = tried(tmp_path, model)
    assert len(lines) == 1
    assert "out_proj" in lines[0]
    assert "leave out_proj out of adapter.targets" in lines[0]
    assert "\n" not in lines[0]
    others = [name for name in linear_and_stacks(model) if not name.endswith("out_proj")]
    assert tried(tmp_path, model, others) == []


def rewritten(folder: Path, change: dict[str, torch.Tensor | None]) -> list[str]:
    """The trial of a Llama whose file has other tensors."""
    model = tiny.llama()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, file)
    return looked(folder, linear_and_stacks(model))


def test_weights_that_cannot_be_merged_are_named(tmp_path: Path) -> None:
    eight_bits = torch.zeros(64, 64).to(torch.float8_e4m3fn)
    (line,) = rewritten(
        tmp_path,
        {f"{Q}.weight": eight_bits, f"{Q.replace('.0.', '.1.')}.weight": eight_bits.clone()},
    )
    assert line.startswith(
        f"adapter.targets: {Q} cannot be merged: {Q}.weight is stored as F8_E4M3"
    )
    assert line.endswith("; or set export.merged: false")
    (line,) = rewritten(tmp_path, {f"{Q}.weight": None})
    assert "has no weight" in line


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_base_that_stays_quantised_is_refused_whatever_is_exported(
    tmp_path: Path, method: str
) -> None:
    folder = tmp_path / "base"
    rewritten(folder, {})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(fields | {"quantization_config": {"quant_method": method}})
    )
    assert looked(folder, [Q], export__merged=False) == [], "this layer was left as it is"
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop(f"{Q}.weight")
    name = f"{Q}.weight" if method == "bitsandbytes" else f"{Q}.qweight"
    save_file(
        tensors | {name: torch.zeros(len(weight) * 32, 1, dtype=torch.uint8)},
        folder / "model.safetensors",
    )
    (line,) = looked(folder, [Q], export__merged=False)
    assert line.startswith(
        f"model.name: {folder} is quantised ({method}): {Q} has no floating-point weight"
    )
    assert "model.quantization" in line
