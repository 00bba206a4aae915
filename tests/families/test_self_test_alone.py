"""The self-test finds errors that were once silent, with all knowledge of families turned off."""

from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.model import attention, load
from olora_ray.train import loss, self_test
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.self_test import choose_attention
from tests import tiny
from tests.families import zoo
from tests.families.check import PACKS
from tests.families.variants import ALL
from tests.refused import refused

CPU = torch.device("cpu")
STATES = (
    "recurrent_gemma",
    "bamba",
    "lfm2",
    "mamba2",
    "falcon_h1",
    "jamba",
    "zamba2",
    "olmo_hybrid",
)
STATES_AND_EXPERTS = ("granitemoehybrid", "qwen3_next", "lfm2_moe", "minimax", "nemotron_h")
HEADS = ("hyperclovax", "falcon_h1", "recurrent_gemma")
NO_BORDERS = ("stablelm", "nemotron")


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which models keep a state, and which have their own attention."""
    monkeypatch.setattr(self_test, "why_not_in_one_row", lambda model, tokens: None)
    monkeypatch.setattr(attention, "_SUPPORT", {"sdpa": "_supports_sdpa"})


def model(name: str, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    zoo.build(ALL[name], folder, dtype)
    kind = str(dtype).removeprefix("torch.")
    config = tiny.config(model__name=str(folder), model__dtype=kind, data__max_length=64)
    return load.load_model(folder, config.model, CPU), config


def chosen(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    made, config = model(name, folder, dtype)
    return choose_attention(SupervisedLoss(made), PACKS, config, CPU)


# In bfloat16 without experts: if rounding decides on experts, a leak may be smaller than the effect of rounding.
@pytest.mark.parametrize(
    ("dtype", "names"),
    [(torch.float32, STATES + STATES_AND_EXPERTS), (torch.bfloat16, STATES)],
    ids=["fp32", "bf16"],
)
def test_packed_examples_of_models_with_a_state(
    dtype: torch.dtype, names: tuple[str, ...], tmp_path: Path
) -> None:
    for name in names:
        with refused("set data.packing: false"):
            chosen(name, tmp_path / name, dtype)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_whose_scaling_is_left_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "OutputHead", lambda made: made.get_output_embeddings())
    with refused("the model's own logits"):
        chosen(name, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NO_BORDERS)
def test_borders_that_do_not_reach_the_attention(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_borders", lambda positions: [0, positions.shape[1]])
    found = chosen(name, tmp_path, dtype)
    assert found.attention == "sdpa"
    assert "other examples in its sequence" in found.passed_over["segments"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_attention_that_the_family_does_not_call(dtype: torch.dtype, tmp_path: Path) -> None:
    # Bloom makes no mask for an attention that it does not know: every token would see later ones.
    made, config = model("bloom", tmp_path, dtype)
    for packs in (PACKS, tiny.unpacked(PACKS)):
        with refused("model.name: BloomForCausalLM"):
            choose_attention(SupervisedLoss(made), packs, config, CPU)
