"""The estimate of a run: its errors, and the parts of a worker's memory that follow from sizes."""

from pathlib import Path

import pytest
import torch

from olora_ray.common.errors import UserError
from olora_ray.config.decided import DecidedConfig
from olora_ray.config.load import override
from olora_ray.model.source import obtain
from olora_ray.train.estimate import estimate
from olora_ray.train.price import card_of, peak_of
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL, COMMON, EXPERTS
from tests.pipelines import project
from tests.refused import refused

LENGTH = 64


def settings(folder: Path, rank: int) -> DecidedConfig:
    return tiny.decided(
        model__name=str(folder),
        model__dtype="float32",
        adapter__rank=rank,
        adapter__alpha=rank,
        data__max_length=LENGTH,
        train__micro_batch=1,
        train__global_batch=1,
    )


def test_of_a_sharded_base_blocks_are_gathered_and_the_rest_is_whole(tmp_path: Path) -> None:
    """FSDP2 gathers into one buffer and copies the weights to their places."""
    tiny.save(tmp_path, vocab_size=50_000)
    config = override(settings(tmp_path, 2), {"cluster.strategy": "fsdp", "cluster.workers": 2})
    found = estimate(config, obtain(config), tiny.ON_CPU)
    layers = tiny.llama().model.layers
    block = sum(weight.numel() for weight in layers[0].parameters())
    blocks = block * len(layers)
    assert found.base_bytes == 4 * (found.parameters - blocks) + 4 * blocks // 2
    assert found.gathered_bytes == 4 * 3 * block


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_no_gpu_is_asked_and_bfloat16_is_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Asking a GPU of this machine would start CUDA in the driver, which takes memory from the workers."""

    def started() -> None:
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.cuda, "_lazy_init", started)
    config = tiny.decided(
        model__name=str(project.make_model(tmp_path / "tiny")), model__dtype=dtype
    )
    size = estimate(config, obtain(config), tiny.ON_GPU)
    assert size.base_bytes == 2 * size.parameters


@pytest.mark.parametrize(
    ("family", "stack", "n", "layers"),
    [
        ("qwen3_moe", "model.layers.0.mlp", 24, 2),
        ("llama4_text", "model.layers.1.feed_forward", 96, 1),
    ],
)
def test_adapters_of_experts_count(
    tmp_path: Path, family: str, stack: str, n: int, layers: int
) -> None:
    zoo.build(ALL[family], tmp_path)
    sizes = {}
    for targets in (("self_attn.q_proj",), ("self_attn.q_proj", "experts.down_proj")):
        config = override(settings(tmp_path, 4), {"adapter.targets": targets})
        sizes[targets] = estimate(config, obtain(config), tiny.ON_CPU)
    few, all_of_them = sizes.values()
    experts, m = EXPERTS["num_experts"], COMMON["hidden_size"]
    assert all_of_them.targets[f"{stack}.experts.down_proj"] == (experts, m, n)
    assert all_of_them.trainable - few.trainable == layers * experts * (m + n) * 4
    assert all_of_them.activation_bytes >= few.activation_bytes


def test_ranks_that_move_between_layers_are_counted_at_their_most(tmp_path: Path) -> None:
    tiny.save(tmp_path, num_key_value_heads=4)
    even = settings(tmp_path, 8)
    sizes = {
        rho: estimate(
            override(even, {"adapter.method": "eva", "adapter.rho": rho}), obtain(even), tiny.ON_CPU
        ).trainable
        for rho in (1.0, 2.0)
    }
    assert sizes[1.0] == estimate(even, obtain(even), tiny.ON_CPU).trainable
    assert sizes[1.0] == 2 * 8 * (4 * 2 * 64 + 3 * (64 + 112))
    # Of 7 layers a block the three wide ones have twice the rank, and of the others the rest.
    assert sizes[2.0] == 2 * (3 * 16 * (64 + 112) + 8 * 2 * 64)


def test_experts_are_refused_for_a_method_that_sees_activations(tmp_path: Path) -> None:
    zoo.build(ALL["mixtral"], tmp_path)
    config = override(settings(tmp_path, 4), {"adapter.method": "eva"})
    with refused("adapter.method=eva: model.layers.0.mlp.experts."):
        estimate(config, obtain(config), tiny.ON_CPU)


def test_sequences_that_are_too_long_for_the_model_are_refused_at_once(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    tiny.llama(max_position_embeddings=64, rope_parameters=rope).save_pretrained(tmp_path)
    config = tiny.decided(model__name=str(tmp_path), data__max_length=65)
    with pytest.raises(UserError):
        estimate(config, obtain(config), tiny.ON_CPU)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10G", 125),
    ],
)
def test_only_a_gpu_of_this_name_has_its_makers_peak(name: str, tflops: int | None) -> None:
    assert peak_of(name) == (None if tflops is None else tflops * 1e12)
    assert (card_of(name) is None) == (tflops is None)
