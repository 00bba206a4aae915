"""The light RMSNorm has the same bits forward and the same gradient, and replaces only norms with the same output."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from olora_ray.train.parts import LightRMSNorm, replace_rms_norms


def norm(dtype: torch.dtype) -> nn.Module:
    module = LlamaRMSNorm(24).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.linspace(0.5, 2, 24))
    return module


def forward_backward(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = module(x)
    (gradient,) = torch.autograd.grad(
        y, x, torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
    )
    return y, gradient


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_same_bits_and_gradient(dtype: torch.dtype, tolerance: float) -> None:
    own = norm(dtype)
    model = nn.Sequential(own)
    y, gradient = forward_backward(model, dtype)
    replace_rms_norms(model)
    light = model[0]
    assert isinstance(light, LightRMSNorm)
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    light_y, light_gradient = forward_backward(model, dtype)
    assert torch.equal(y, light_y)
    assert (gradient - light_gradient).norm() <= tolerance * gradient.norm()
    replace_rms_norms(model)
    assert model[0] is light, "once is enough"


def test_what_it_does_plainly_is_the_familys_norm_with_the_weight_of_now() -> None:
    with torch.device("meta"):
        model = nn.Sequential(LlamaRMSNorm(24).requires_grad_(False))
    replace_rms_norms(model)
    light = model[0]
    assert isinstance(light, LightRMSNorm)
    own = norm(torch.float32)
    light.weight = own.weight  # as when a base is read from its files
    x = torch.randn(3, 24)
    assert torch.equal(light.plainly(x), own(x))
    assert torch.equal(light(x), own(x))


def test_other_norms_stay() -> None:
    gemma = GemmaRMSNorm(24).requires_grad_(False)
    model = nn.ModuleList([gemma, norm(torch.float32).requires_grad_(True), nn.LayerNorm(24)])
    replace_rms_norms(model)
    assert not any(isinstance(each, LightRMSNorm) for each in model)
