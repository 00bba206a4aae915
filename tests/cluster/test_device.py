"""A process computes on the GPU that Ray gave it, never on one that merely is there."""

from collections.abc import Iterator, Mapping

import pytest
import ray
import torch

from olora_ray.cluster.worker_context import assigned_device, device_of
from tests.refused import refused


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ([], {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "cpu"),
        (["3"], {"CUDA_VISIBLE_DEVICES": "1,3"}, "cuda:1"),
        (["GPU-5e1b", "GPU-77aa"], {"CUDA_VISIBLE_DEVICES": "GPU-77aa,GPU-5e1b"}, "cuda:1"),
        (["2"], {"HIP_VISIBLE_DEVICES": "2"}, "cuda:0"),
        (["2"], {}, "cuda:2"),
    ],
)
def test_the_device_is_the_first_that_was_given(
    given: list[str], environment: Mapping[str, str], expected: str
) -> None:
    assert device_of(given, environment) == torch.device(expected)


def given_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: list[int], usable: bool = True, ray_runs: bool = True
) -> None:
    """Have Ray give this process these GPUs of its node, which torch can use or not."""
    for place, name, value in (
        (ray, "is_initialized", ray_runs),
        (ray, "get_gpu_ids", gpus),
        (torch.cuda, "is_available", usable),
    ):
        monkeypatch.setattr(place, name, lambda value=value: value)


def test_without_ray_it_is_the_cpu_whatever_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    given_gpus(monkeypatch, [0], ray_runs=False)
    assert assigned_device() == torch.device("cpu")


def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given_gpus(monkeypatch, [3], usable=False)
    with refused("cluster.gpus_per_worker"):
        assigned_device()


@pytest.fixture
def as_in_nvidias_images() -> Iterator[None]:
    """torch as their environment has it when it starts: float32 is multiplied as TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("as_in_nvidias_images")
def test_float32_is_multiplied_as_float32_in_a_process_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_gpus(monkeypatch, [])
    assert assigned_device() == torch.device("cpu")
    assert torch.get_float32_matmul_precision() == "high", "nothing to do with us"
    given_gpus(monkeypatch, [0])
    assert assigned_device().type == "cuda"
    assert torch.get_float32_matmul_precision() == "highest"
