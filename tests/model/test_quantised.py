"""A layer with a packed weight equals, bit for bit, a layer with the weight that it unpacks to."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olora_ray.common.errors import UserError
from olora_ray.model import quantised
from olora_ray.model.quantised import KINDS, QuantisedLinear
from tests.packed import EACH_KIND, dense, needs_bitsandbytes

DTYPES = [torch.float32, torch.bfloat16]


def made(
    m: int, n: int, kind: str, dtype: torch.dtype = torch.float32, bias: bool = False
) -> tuple[Tensor, Any]:
    """A weight, and the layer in which it is packed."""
    generator = torch.Generator().manual_seed(m * n)
    weight = torch.randn(m, n, generator=generator).to(dtype)
    own = (
        nn.Parameter(torch.randn(m, generator=generator).to(dtype), requires_grad=False)
        if bias
        else None
    )
    return weight, QuantisedLinear(weight, own, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", EACH_KIND)
def test_outputs_and_gradients_are_those_of_the_unpacked_weight(
    kind: str, bias: bool, dtype: torch.dtype
) -> None:
    _, layer = made(96, 64, kind, dtype, bias)
    other = dense(layer)
    for shape in ((5, 64), (2, 3, 64)):
        x, y = (
            torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in "xy"
        )
        x.requires_grad_(), y.requires_grad_()
        ours, theirs = layer(x), other(y)
        assert torch.equal(ours, theirs)
        grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        ours.backward(grad)
        theirs.backward(grad)
        assert x.grad is not None
        assert y.grad is not None
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_a_weight_is_near_what_was_packed_in_fewer_bytes(kind: str) -> None:
    weight, layer = made(130, 96, kind)
    error = float((layer.weight - weight).norm() / weight.norm())
    assert 0 < error < {"nf4": 0.12, "int8": 0.01, "fp8": 0.04}[kind]
    assert layer.codes.nbytes + layer.scales.nbytes == KINDS[kind].size(130, 96)
    assert not list(layer.parameters())
    assert layer.state_dict() == {}


@pytest.mark.parametrize("kind", EACH_KIND)
def test_rows_of_zeros_stay_and_what_is_not_finite_is_seen(kind: str) -> None:
    weight, _ = made(128, 64, kind)
    weight[3] = 0
    assert not QuantisedLinear(weight, None, kind).weight[3].any()
    for odd in (float("nan"), float("inf")):
        weight[5, 7] = odd
        assert not QuantisedLinear(weight, None, kind).weight.isfinite().all()


@needs_bitsandbytes
@pytest.mark.parametrize(("m", "n"), [(96, 64), (130, 96), (50, 36), (7, 14)])
def test_nf4_is_by_its_formula(m: int, n: int) -> None:
    # This includes blocks of 64 that span two rows, which bitsandbytes itself gets wrong on CPUs.
    import bitsandbytes.functional as library

    weight, layer = made(m, n, "nf4")
    values = library.get_4bit_type("nf4", device="cpu")
    codes = (
        torch.stack([layer.codes.flatten() >> 4, layer.codes.flatten() & 15], dim=1)
        .flatten()
        .long()
    )
    numbers = values[codes[: m * n]] * layer.scales[torch.arange(m * n) // 64]
    assert torch.equal(layer.weight, numbers.view(m, n))
    nearest = (weight.flatten() / layer.scales[torch.arange(m * n) // 64])[:, None] - values
    assert (nearest.abs().argmin(dim=1) == codes[: m * n]).float().mean() > 0.999  # but for ties


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_package_that_is_missing_is_named_with_what_installs_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=rf"^model\.quantization: {kind} needs bitsandbytes.*olora-ray\[quant\]"
    ) as one:
        quantised.require(kind)
    assert "\n" not in str(one.value)
    quantised.require("fp8")  # torch has it
