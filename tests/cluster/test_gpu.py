"""What only a GPU can show; all that can be shown without one is in tests/device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from olora_ray.cluster.worker_context import assigned_device
from olora_ray.model.attention import candidates, kernel
from olora_ray.model.load import pick_dtype
from olora_ray.tokens.collate import collate
from tests import device_walk, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_equals_the_base_exactly(dtype: torch.dtype) -> None:
    base = tiny.llama(attention="sdpa", dtype=dtype).cuda()
    ids = torch.randint(2, tiny.VOCABULARY, (2, 16), device="cuda")
    with torch.no_grad():
        expected = base(ids, use_cache=False).logits
        adapted = tiny.trainer(
            tiny.decided(), attention="sdpa", model=tiny.llama(attention="sdpa", dtype=dtype)
        )
        adapted.loss.cuda()
        assert torch.equal(adapted.loss.model(ids, use_cache=False).logits, expected)


WINDOW = 8


@pytest.mark.parametrize("window", [None, WINDOW])
def test_losses_and_gradients_do_not_depend_on_the_attention(window: int | None) -> None:
    def model(attention: str, dtype: torch.dtype) -> Any:
        if window is None:
            return tiny.llama(attention=attention, dtype=dtype)
        made = tiny.of_kind(
            "mistral", tiny.SMALL | {"sliding_window": window, "initializer_range": 0.1}
        ).to(dtype)
        made.set_attn_implementation(attention)
        return made

    def measured(attention: str, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        trainer = tiny.trainer(tiny.decided(), attention=attention, model=model(attention, dtype))
        trainer.flat.vector.copy_(0.05 * torch.randn(trainer.flat.vector.shape))
        trainer.loss.cuda()
        adapters = [
            part.requires_grad_()
            for layer in trainer.adapted.values()
            for part in (layer.da, layer.db)
        ]
        loss = trainer.loss(
            collate([tiny.pack(40, 7, 12), tiny.pack(23)], attention).to(torch.device("cuda"))
        )
        return float(loss.detach()), torch.cat(
            [part.reshape(-1) for part in torch.autograd.grad(loss, adapters)]
        )

    exact, right = measured("eager", torch.float32)
    device, settings = torch.device("cuda"), tiny.decided().model
    picked = candidates(tiny.llama(), settings, pick_dtype(settings, device), device)[0]
    for attention in ("varlen", "sdpa", "eager") + (("segments", picked) if window is None else ()):
        if attention == "varlen" and kernel() is None:
            continue
        found, gradient = measured(attention, torch.bfloat16)
        assert found == pytest.approx(exact, rel=1e-2), attention
        assert float((gradient - right).norm() / right.norm()) < 5e-2, attention


@pytest.mark.parametrize("attention", ["segments", "sdpa"])
def test_a_batch_comes_whole_to_the_gpu(attention: str) -> None:
    for seed in range(50):  # the memory that is copied from is used again
        batch = collate([tiny.pack(40, 7, seed=seed), tiny.pack(12, seed=seed + 1)], attention)
        moved = batch.to(torch.device("cuda"))
        for name, value in batch.inputs.items():
            other = moved.inputs[name]
            if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
                assert torch.equal(value, other.cpu())
                assert value.dtype == other.dtype
        assert torch.equal(batch.labels, moved.labels.cpu())
        assert torch.equal(batch.predicts, moved.predicts.cpu())


def test_a_training_on_a_gpu_is_that_on_a_cpu(tmp_path: Path) -> None:
    cpu, gpu = (
        device_walk.walk(
            device_walk.start(tiny.llama(), torch.device(device)),
            device_walk.kept_in(tmp_path / device),
        )
        for device in ("cpu", "cuda")
    )
    assert gpu.before == pytest.approx(cpu.before, rel=1e-5)
    assert gpu.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert gpu.after == pytest.approx(cpu.after, rel=1e-3)
    assert list(map(len, gpu.answers)) == list(map(len, cpu.answers))


def test_a_process_computes_on_the_gpu_that_ray_gave_it(ray_with: Callable[[int], None]) -> None:
    ray_with(2)
    ask = ray.remote(assigned_device)
    assert ray.get(ask.options(num_gpus=1).remote()) == torch.device("cuda", 0)
    assert ray.get(ask.options(num_gpus=0).remote()) == torch.device(
        "cpu"
    )  # though torch sees the GPU there
