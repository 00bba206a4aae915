"""The attention implementations that are tried, and their order."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olora_ray.common.errors import UserError
from olora_ray.model import attention
from olora_ray.model.attention import SHORT, candidates, own, segment_attention, trial
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL
from tests.refused import refused
from tests.tiny import SMALL, of_kind
from tests.varlen_on_cpu import varlen_on_cpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")

BLOOM = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}


def tried(
    made: Any, wanted: str = "auto", dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Any:
    return candidates(made, tiny.config(model__attention=wanted).model, dtype, device)


def test_what_the_family_has_the_fastest_first() -> None:
    assert tried(tiny.llama()) == ("segments", "sdpa", "eager")
    assert tried(of_kind("falcon", SMALL)) == ("sdpa", "eager")
    assert tried(of_kind("bloom", BLOOM)) == ("eager",)
    assert [own(made) for made in (tiny.llama(), of_kind("bloom", BLOOM))] == ["sdpa", "eager"]


@pytest.mark.parametrize("wanted", ["segments", "sdpa", "flash_attention_2"])
def test_what_the_family_does_not_have_is_refused(wanted: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"{wanted}: BloomForCausalLM does not support it; set model.attention: auto$",
    ):
        tried(of_kind("bloom", BLOOM), wanted)


def on_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], package: bool = True
) -> None:
    """Pretend to have such a GPU and the package flash-attn, which imports there or does not."""
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if package:
        monkeypatch.setitem(
            sys.modules, "flash_attn.flash_attn_interface", ModuleType("flash_attn_interface")
        )


def test_flash_needs_a_gpu_its_package_and_half_a_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("flash_attention_2", "varlen"):
        with pytest.raises(UserError):
            tried(tiny.llama(), name, torch.bfloat16)
    assert tried(tiny.llama(), device=GPU) == ("sdpa", "eager")
    for capability, found in (
        ((7, 5), ("sdpa", "eager")),
        ((8, 0), ("flash_attention_2", "sdpa", "eager")),
    ):
        on_gpu(monkeypatch, capability)
        assert tried(tiny.llama(), dtype=torch.bfloat16, device=GPU) == found
    with refused("does not compute in float32; set model.dtype to bfloat16"):
        tried(tiny.llama(), "flash_attention_2", torch.float32, GPU)


def test_flash_is_not_tried_with_a_family_that_is_made_for_other_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu(monkeypatch, (9, 0))
    made = zoo.on_meta(ALL["gpt_oss"])
    assert tried(made, dtype=torch.bfloat16, device=GPU)[-1] == "eager"
    assert "flash_attention_2" not in tried(made, dtype=torch.bfloat16, device=GPU)
    with refused(
        "flash_attention_2: GptOssForCausalLM supports only other kernels; set model.attention"
    ):
        tried(made, "flash_attention_2", torch.bfloat16, GPU)


def test_flash_of_another_torch_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn").mkdir()
    broken = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c1')\n"
    (tmp_path / "flash_attn" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    on_gpu(monkeypatch, (8, 0), package=False)
    assert tried(tiny.llama(), dtype=torch.bfloat16, device=GPU) == ("sdpa", "eager")
    with pytest.raises(
        UserError,
        match=r"flash-attn does not import: .*undefined symbol.*; set model.attention: auto$",
    ):
        tried(tiny.llama(), "flash_attention_2", torch.bfloat16, GPU)


CPU = torch.device("cpu")
LENGTHS = (7, 1, 33, 16)

NEWER = pytest.mark.skipif(attention.kernel() is None, reason="needs a newer torch")


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    trial.cache_clear()
    yield
    trial.cache_clear()


def inputs(narrow: int = 16, size: int = 16) -> list[Tensor]:
    """Tensors in the memory layout of a model: (1, T, H, D); heads of values may be narrower."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, size), (2, size), (2, narrow))
    drawn = [torch.randn(1, sum(LENGTHS), *shape, generator=generator) for shape in shapes]
    return [part.transpose(1, 2).requires_grad_() for part in drawn]


def run(parts: list[Tensor], **wishes: Any) -> Tensor:
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(parts[0].device)
    told = {"cu_seq_lens_q": borders, "max_length_q": max(LENGTHS)} | wishes
    return attention.varlen_attention(nn.Module(), *parts, None, **told)[0]


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    window: int | None = None,
    scale: float = 0.25,
) -> Tensor:
    """Attention with a mask over everything; (1, T, H, D)."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    total, ways = len(segment), query.shape[1] // key.shape[1]
    sees = (segment[:, None] == segment) & torch.ones(total, total, dtype=torch.bool).tril()
    if window is not None:
        sees &= torch.ones(total, total, dtype=torch.bool).triu(1 - window)
    scores = query @ key.repeat_interleave(ways, 1).mT * scale
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(ways, 1)).transpose(1, 2)


@NEWER
@pytest.mark.parametrize("narrow", [16, 8])
@pytest.mark.parametrize("window", [None, 1, 5, 33, 100])
def test_equals_the_definition(window: int | None, narrow: int) -> None:
    parts = inputs(narrow)
    scaling = None if window is None else 0.3
    with varlen_on_cpu():
        found = run(parts, sliding_window=window, scaling=scaling)
        expected = definition(*parts, LENGTHS, window, scaling or 16**-0.5)
        weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
        pairs = zip(
            (found, *torch.autograd.grad(found, parts, weights)),
            (expected, *torch.autograd.grad(expected, parts, weights)),
            strict=True,
        )
    for got, right in pairs:
        assert got.shape == right.shape
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("wish", "instead"),
    [
        ({"softcap": 50.0}, "eager"),
        ({"s_aux": torch.zeros(6)}, "eager"),
        ({"cu_seq_lens_q": None}, "sdpa"),
        ({"max_length_q": None}, "sdpa"),
    ],
)
def test_what_it_does_not_do_is_left_to_others(wish: dict[str, Any], instead: str) -> None:
    with pytest.raises(UserError, match=f"set model.attention: {instead}"):
        run(inputs(), **wish)


@pytest.mark.parametrize(("size", "narrow"), [(12, 12), (264, 264), (208, 208), (16, 24)])
def test_heads_that_the_kernel_does_not_take_are_left_to_sdpa(size: int, narrow: int) -> None:
    parts = [torch.zeros(1, 2, sum(LENGTHS), width) for width in (size, size, narrow)]
    with pytest.raises(UserError):
        run(parts)


@NEWER
def test_the_trial_passes_a_kernel_that_is_right_and_no_other() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with varlen_on_cpu():
            assert trial(dtype, CPU) is None
        trial.cache_clear()
        with varlen_on_cpu(wider=1):
            assert "its kernel has a relative error of" in str(trial(dtype, CPU))
        trial.cache_clear()
    assert "its kernel fails here: Could not run" in str(trial(torch.bfloat16, CPU))


@NEWER
def test_it_is_the_second_on_a_gpu_where_its_kernel_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_tried(
        wanted: str = "auto", dtype: torch.dtype = torch.bfloat16, told: str | None = None
    ) -> Any:
        monkeypatch.setattr(attention, "trial", lambda dtype, device: told)
        return tried(tiny.llama(), wanted, dtype, GPU)

    for capability, found in (((7, 5), ("sdpa", "eager")), ((8, 0), ("varlen", "sdpa", "eager"))):
        on_gpu(monkeypatch, capability, package=False)
        assert varlen_tried() == found
    assert varlen_tried("varlen") == ("varlen",)
    assert varlen_tried(dtype=torch.float32) == ("sdpa", "eager")
    with refused("varlen: it does not compute in float32; set model.dtype to bfloat16"):
        varlen_tried("varlen", torch.float32)
    assert varlen_tried(told="its kernel fails here: no image") == ("sdpa", "eager")
    with refused("varlen: its kernel fails here: no image; set model.attention: auto"):
        varlen_tried("varlen", told="its kernel fails here: no image")


SEGMENTS = ((7,), (16, 3, 33, 1, 17, 16), (40, SHORT + 5, 5))


def segments(lengths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # The memory layout of a model: (1, T, H, D).
    return [
        torch.randn(1, sum(lengths), heads, 16, generator=generator).to(dtype).transpose(1, 2)
        for heads in (6, 2, 2)
    ]


def run_segments(parts: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    borders = torch.tensor([0, *lengths]).cumsum(0)
    return segment_attention(nn.Module(), *parts, None, cu_seq_lens_q=borders)[0]


def gradients(output: Tensor, parts: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad(output, parts, weights)]


@pytest.mark.parametrize("lengths", SEGMENTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_segments_equal_the_definition(
    lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    parts = [part.requires_grad_() for part in segments(lengths, dtype)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = gradients(definition(*exact, lengths), exact)
    for got, right in zip(gradients(run_segments(parts, lengths), parts), expected, strict=True):
        assert got.shape == right.shape
        assert (got.double() - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize(
    "wish", [{"softcap": 50.0}, {"sliding_window": 4}, {"s_aux": torch.zeros(6)}]
)
def test_refuses_what_it_does_not_do(wish: dict[str, object]) -> None:
    with pytest.raises(UserError):
        segment_attention(
            nn.Module(),
            *segments((9,), torch.float32),
            None,
            position_ids=torch.arange(9)[None],
            **wish,
        )  # type: ignore[arg-type]
