"""Segment attention: both ways against attention written out, values and gradients."""

import pytest
import torch
from torch import Tensor, nn

from olora_ray.common.errors import UserError
from olora_ray.model.attention import SHORT, segment_attention

LENGTHS = ((7,), (16, 3, 33, 1, 17, 16), (40, SHORT + 5, 5))


def plain(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The definition, with a mask over everything; (1, T, H, D)."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    total, ways = len(segment), query.shape[1] // key.shape[1]
    mask = (segment[:, None] == segment) & torch.ones(total, total, dtype=torch.bool).tril()
    scores = query @ key.repeat_interleave(ways, 1).transpose(2, 3) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(ways, 1)).transpose(1, 2)


def inputs(lengths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # As a model has them: (1, T, H, D) in memory.
    return [
        torch.randn(1, sum(lengths), heads, 16, generator=generator).to(dtype).transpose(1, 2) for heads in (6, 2, 2)
    ]


def run(parts: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    borders = torch.tensor([0, *lengths]).cumsum(0)
    return segment_attention(nn.Module(), *parts, None, cu_seq_lens_q=borders)[0]


def gradients(output: Tensor, parts: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad(output, parts, weights)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_equals_the_definition(lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    parts = [part.requires_grad_() for part in inputs(lengths, dtype)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = gradients(plain(*exact, lengths), exact)
    for got, right in zip(gradients(run(parts, lengths), parts), expected, strict=True):
        assert got.shape == right.shape
        assert (got.double() - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_do_not_see_each_other(dtype: torch.dtype) -> None:
    lengths = (20, 13, 20)
    parts = inputs(lengths, dtype)
    before = run(parts, lengths)
    for part in parts:
        part[:, :, 20:33] = 100.0
    after = run(parts, lengths)
    assert torch.equal(before[:, :20], after[:, :20])
    assert torch.equal(before[:, 33:], after[:, 33:])


@pytest.mark.parametrize("wish", [{"softcap": 50.0}, {"sliding_window": 4}, {"s_aux": torch.zeros(6)}])
def test_refuses_what_it_does_not_do(wish: dict[str, object]) -> None:
    with pytest.raises(UserError, match="eager"):
        segment_attention(nn.Module(), *inputs((9,), torch.float32), None, position_ids=torch.arange(9)[None], **wish)  # type: ignore[arg-type]
