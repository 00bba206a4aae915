"""Attention by torch's kernel for variable lengths: what it is asked for, what it leaves to others, how it is tried."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olora_ray.common.errors import UserError
from olora_ray.model import attention
from olora_ray.model.attention import candidates, trial
from tests import tiny
from tests.varlen_on_cpu import varlen_on_cpu

CPU = torch.device("cpu")
LENGTHS = (7, 1, 33, 16)

pytestmark = pytest.mark.skipif(attention.kernel() is None, reason="needs a newer torch")


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    trial.cache_clear()
    yield
    trial.cache_clear()


def inputs(narrow: int = 16, size: int = 16) -> list[Tensor]:
    """As a model has them: (1, T, H, D) in memory; heads of values may be narrower."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, size), (2, size), (2, narrow))
    drawn = [torch.randn(1, sum(LENGTHS), *shape, generator=generator) for shape in shapes]
    return [part.transpose(1, 2).requires_grad_() for part in drawn]


def run(parts: list[Tensor], **wishes: Any) -> Tensor:
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(parts[0].device)
    told = {"cu_seq_lens_q": borders, "max_length_q": max(LENGTHS)} | wishes
    return attention.varlen_attention(nn.Module(), *parts, None, **told)[0]


def definition(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    total, ways = len(segment), query.shape[1] // key.shape[1]
    sees = (segment[:, None] == segment) & torch.ones(total, total, dtype=torch.bool).tril()
    if window is not None:
        sees &= torch.ones(total, total, dtype=torch.bool).triu(1 - window)
    scores = query @ key.repeat_interleave(ways, 1).mT * scale
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(ways, 1)).transpose(1, 2)


@pytest.mark.parametrize("narrow", [16, 8])
@pytest.mark.parametrize("window", [None, 1, 5, 33, 100])
def test_equals_the_definition(window: int | None, narrow: int) -> None:
    parts = inputs(narrow)
    scaling = None if window is None else 0.3
    with varlen_on_cpu():
        found = run(parts, sliding_window=window, scaling=scaling)
        expected = definition(*parts, window, scaling or 16**-0.5)
        weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
        pairs = zip(
            (found, *torch.autograd.grad(found, parts, weights)),
            (expected, *torch.autograd.grad(expected, parts, weights)),
            strict=True,
        )
    for got, right in pairs:
        assert got.shape == right.shape
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("size", "narrow"), [(16, 16), (64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("window", [None, 1, 5, 33])
def test_the_kernel_itself_equals_the_definition(
    window: int | None, size: int, narrow: int, dtype: torch.dtype
) -> None:
    assert trial(dtype, torch.device("cuda", 0)) is None
    exact = inputs(narrow, size)
    parts = [part.detach().to("cuda", dtype).requires_grad_() for part in exact]
    found, expected = run(parts, sliding_window=window), definition(*exact, window, size**-0.5)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
    pairs = zip(
        (found, *torch.autograd.grad(found, parts, weights.to(found))),
        (expected, *torch.autograd.grad(expected, exact, weights)),
        strict=True,
    )
    for got, right in pairs:
        assert float((got.detach().float().cpu() - right.detach()).norm() / right.detach().norm()) < 0.02


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
    with pytest.raises(UserError, match=f"set it to {instead}"):
        run(inputs(), **wish)


@pytest.mark.parametrize(("size", "narrow"), [(12, 12), (264, 264), (208, 208), (16, 24)])
def test_heads_that_the_kernel_does_not_take_are_left_to_sdpa(size: int, narrow: int) -> None:
    parts = [torch.zeros(1, 2, sum(LENGTHS), width) for width in (size, size, narrow)]
    with pytest.raises(UserError, match=f"heads of {size} and {narrow} .* set it to sdpa"):
        run(parts)


def test_the_trial_passes_a_kernel_that_is_right_and_no_other() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with varlen_on_cpu():
            assert trial(dtype, CPU) is None
        trial.cache_clear()
        with varlen_on_cpu(wider=1):
            assert "its kernel is off by" in str(trial(dtype, CPU))
        trial.cache_clear()
    assert "its kernel fails here: Could not run" in str(trial(torch.bfloat16, CPU))


def test_it_is_the_second_on_a_gpu_where_its_kernel_works(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")

    def tried(wanted: str = "auto", dtype: torch.dtype = torch.bfloat16, told: str | None = None) -> tuple[str, ...]:
        monkeypatch.setattr(attention, "trial", lambda dtype, device: told)
        return candidates(tiny.llama(), tiny.config(model__attention=wanted).model, dtype, gpu)

    for capability, found in (((7, 5), ("sdpa", "eager")), ((8, 0), ("varlen", "sdpa", "eager"))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert tried() == found
    assert tried("varlen") == ("varlen",)
    assert tried(dtype=torch.float32) == ("sdpa", "eager")
    with pytest.raises(UserError, match=r"varlen: it does not compute in float32; set model\.dtype to bfloat16"):
        tried("varlen", torch.float32)
    assert tried(told="its kernel fails here: no image") == ("sdpa", "eager")
    with pytest.raises(UserError, match="varlen: its kernel fails here: no image; set it to auto"):
        tried("varlen", told="its kernel fails here: no image")


def test_it_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="varlen: it needs a GPU"):
        candidates(tiny.llama(), tiny.config(model__attention="varlen").model, torch.bfloat16, CPU)
