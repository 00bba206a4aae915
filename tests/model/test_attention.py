"""Which attention is tried, in which order."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from olora_ray.common.errors import UserError
from olora_ray.model.attention import candidates, own
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL
from tests.tiny import SMALL, of_kind

CPU, GPU = torch.device("cpu"), torch.device("cuda")

BLOOM = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}


def tried(made: Any, wanted: str = "auto", dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Any:
    return candidates(made, tiny.config(model__attention=wanted).model, dtype, device)


def test_what_the_family_has_the_fastest_first() -> None:
    assert tried(tiny.llama()) == ("segments", "sdpa", "eager")
    assert tried(of_kind("falcon", SMALL)) == ("sdpa", "eager")
    assert tried(of_kind("bloom", BLOOM)) == ("eager",)
    assert [own(made) for made in (tiny.llama(), of_kind("bloom", BLOOM))] == ["sdpa", "eager"]


def test_the_one_that_is_named_alone() -> None:
    assert tried(tiny.llama(), "eager") == ("eager",)


@pytest.mark.parametrize(
    ("wanted", "dtype", "device", "why"),
    [
        ("segments", torch.float32, CPU, "BloomForCausalLM does not have it"),
        ("sdpa", torch.float32, CPU, "BloomForCausalLM does not have it"),
        ("flash_attention_2", torch.float32, CPU, "BloomForCausalLM does not have it"),
    ],
)
def test_what_the_family_does_not_have_is_refused(
    wanted: str, dtype: torch.dtype, device: torch.device, why: str
) -> None:
    with pytest.raises(UserError, match=rf"{wanted}: {why}; set it to auto$"):
        tried(of_kind("bloom", BLOOM), wanted, dtype, device)


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], package: bool = True) -> None:
    """As on a machine with such a GPU and the package flash-attn, which imports there or does not."""
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if package:
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", ModuleType("flash_attn_interface"))


def test_flash_needs_a_gpu_its_package_and_half_a_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="it needs a GPU"):
        tried(tiny.llama(), "flash_attention_2", torch.bfloat16)
    assert tried(tiny.llama(), device=GPU) == ("sdpa", "eager")
    for capability, found in (((7, 5), ("sdpa", "eager")), ((8, 0), ("flash_attention_2", "sdpa", "eager"))):
        on_gpu(monkeypatch, capability)
        assert tried(tiny.llama(), dtype=torch.bfloat16, device=GPU) == found
    with pytest.raises(UserError, match=r"does not compute in float32; set model\.dtype to bfloat16"):
        tried(tiny.llama(), "flash_attention_2", torch.float32, GPU)


def test_flash_is_not_tried_with_a_family_that_is_made_for_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (9, 0))
    made = zoo.on_meta(ALL["gpt_oss"])
    assert tried(made, dtype=torch.bfloat16, device=GPU)[-1] == "eager"
    assert "flash_attention_2" not in tried(made, dtype=torch.bfloat16, device=GPU)
    with pytest.raises(UserError, match=r"flash_attention_2: GptOssForCausalLM is made for other kernels; set it to"):
        tried(made, "flash_attention_2", torch.bfloat16, GPU)


def test_flash_of_another_torch_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn").mkdir()
    broken = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c1')\n"
    (tmp_path / "flash_attn" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    on_gpu(monkeypatch, (8, 0), package=False)
    assert tried(tiny.llama(), dtype=torch.bfloat16, device=GPU) == ("sdpa", "eager")
    with pytest.raises(UserError, match=r"flash-attn does not import: .*undefined symbol.*; set it to auto$"):
        tried(tiny.llama(), "flash_attention_2", torch.bfloat16, GPU)
