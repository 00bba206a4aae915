"""The light RMSNorm has the same bits forward and the same gradient, and replaces only norms with the same output."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from olora_ray.train.loss import LightRMSNorm, patch_rms_norm


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
    module = norm(dtype)
    y, gradient = forward_backward(module, dtype)
    assert patch_rms_norm(module) == 1
    assert isinstance(module, LightRMSNorm)
    light, light_gradient = forward_backward(module, dtype)
    assert torch.equal(y, light)
    assert (gradient - light_gradient).norm() <= tolerance * gradient.norm()


def test_other_norms_stay() -> None:
    trainable = norm(torch.float32).requires_grad_(True)
    assert (
        patch_rms_norm(
            nn.ModuleList([GemmaRMSNorm(24).requires_grad_(False), trainable, nn.LayerNorm(24)])
        )
        == 0
    )
