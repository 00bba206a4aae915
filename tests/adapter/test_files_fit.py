"""Stored tensors that do not fit the config: what would be another model is found, what is left out is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from olora_ray.adapter import stored
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

Q = "model.layers.0.self_attn.q_proj"


def looked(folder: Path, change: dict[str, torch.Tensor], prefix: str = "") -> stored.Fit:
    """At a Llama whose file has other tensors, by names without `prefix`."""
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
    assert "LlamaForCausalLM has no such bias" in found.problem
    assert looked(tmp_path, {f"{Q}.bias": torch.zeros(64)}, prefix).problem is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_packed_numbers_without_their_meaning_are_another_model(tmp_path: Path, dtype: torch.dtype) -> None:
    found = looked(tmp_path, {f"{Q}.weight": torch.ones(64, 64).to(dtype), f"{Q}.weight_scale": torch.ones(1)})
    assert found.problem is not None
    assert found.problem.startswith(f"has {Q}.weight as ")
    assert "no quantization_config" in found.problem


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    more = {"mtp.head.weight": torch.ones(2, 2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert looked(tmp_path, more) == stored.Fit(None, ("mtp.head.weight",))
