"""Tensors that transformers splits or shuffles at loading: a change goes back to where its numbers came from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, conversion_mapping, modeling_utils
from transformers.core_model_loading import (
    Chunk,
    Interleave,
    Split,
    WeightConverter,
    WeightRenaming,
)

from olora_ray.config.schema import Adapter
from olora_ray.model import stored
from olora_ray.pipeline import merge
from tests import tiny
from tests.export_parts import Case, logits, make_stacked_case
from tests.families import zoo
from tests.families.variants import ALL

QKV = [f"self_attn.{part}_proj.weight" for part in "qkv"]
GATE_UP = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
LAYERS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"]


def mapping(*_: Any, **__: Any) -> list[Any]:
    """Return a family's conversion: fused projections, alternating rows of gate and up, and another name."""
    return [
        WeightRenaming(r"^backbone\.", "model."),
        WeightConverter("self_attn.qkv.weight", list(QKV), [Split(dim=0)]),
        WeightConverter("mlp.w13.weight", list(GATE_UP), [Interleave(dim=0), Chunk(dim=0)]),
    ]


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {
        name.replace("model.", "backbone.", 1): part
        for name, part in tensors.items()
        if "layers" not in name
    }
    for number in range(2):
        place = f"model.layers.{number}."
        own = {
            name.removeprefix(place): part
            for name, part in tensors.items()
            if name.startswith(place)
        }
        own["self_attn.qkv.weight"] = torch.cat([own.pop(name) for name in QKV])
        gate, up = (own.pop(name) for name in GATE_UP)
        own["mlp.w13.weight"] = torch.stack([gate, up], 1).flatten(0, 1)
        found |= {f"backbone.layers.{number}.{name}": part for name, part in own.items()}
    return found


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    names = [f"model.layers.{number}.{layer}" for number in range(2) for layer in LAYERS]
    found = make_stacked_case(tmp_path / "base", tiny.llama(), Adapter(rank=3, alpha=6), names)
    file = found.base / "model.safetensors"
    save_file(fused(load_file(file)), file, metadata={"format": "pt"})
    for module in (conversion_mapping, modeling_utils):
        monkeypatch.setattr(module, "get_model_conversion_mapping", mapping)
    return found


def test_transformers_reads_the_merged_files_as_the_adapted_model(
    case: Case, tmp_path: Path
) -> None:
    case.write_merged(tmp_path / "merged")
    found = stored.groups(case.base, case.model, case.adapter)
    assert {layer for group in found for layer in group.layers} == set(case.adapter)
    assert sum(len(group.layers) == 2 for group in found) == 2, "q and v are one stored tensor"
    assert (
        merge.check_weights(case.base, tmp_path / "merged", found, case.adapter, case.scale).error
        < 1
    )
    assert merge.changed(case.base, tmp_path / "merged", found) == []
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, case.logits, atol=2e-5, rtol=0)


Q = "model.layers.0.self_attn.q_proj"


def looked(folder: Path, change: dict[str, torch.Tensor], prefix: str = "") -> stored.Fit:
    """Read a Llama whose file has other tensors, by names without `prefix`."""
    model = tiny.llama()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file) | change
    save_file({name.removeprefix(prefix): value for name, value in tensors.items()}, file)
    return stored.fit(folder, model)


@pytest.mark.parametrize("family", ["gemma3", "phi3", "qwen3_moe mlp", "gpt_neox"])
def test_a_model_fits_its_own_files(tmp_path: Path, family: str) -> None:
    model = zoo.make(ALL[family])
    model.save_pretrained(tmp_path)
    assert stored.fit(tmp_path, model) == stored.Fit(None, ())


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_bias_that_the_config_turns_off_is_another_model(tmp_path: Path, prefix: str) -> None:
    found = looked(tmp_path, {f"{Q}.bias": torch.ones(64)}, prefix)
    assert found.problem is not None
    assert found.problem.startswith(f"has {Q}.bias".replace(f" {prefix}", " "))
    assert "LlamaForCausalLM no such bias" in found.problem
    assert looked(tmp_path, {f"{Q}.bias": torch.zeros(64)}, prefix).problem is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_packed_numbers_without_their_meaning_are_another_model(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    found = looked(
        tmp_path, {f"{Q}.weight": torch.ones(64, 64).to(dtype), f"{Q}.weight_scale": torch.ones(1)}
    )
    assert found.problem is not None
    assert found.problem.startswith(f"has {Q}.weight as ")
    assert "no quantization_config" in found.problem


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    more = {
        "mtp.head.weight": torch.ones(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    assert looked(tmp_path, more) == stored.Fit(None, ("mtp.head.weight",))
