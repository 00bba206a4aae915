"""Every private part of Ray that the product uses is still there, and still says what it said."""

import ast
import importlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olora_ray.cluster import node_facts, preflight, ray_internals
from olora_ray.cluster.address import allocator
from olora_ray.cluster.resources import free_abandoned
from olora_ray.cluster.worker_context import VISIBLE, device_of
from olora_ray.common.logs import ENVIRONMENT
from tests.waiting import until

PACKAGE = Path(ray_internals.__file__).parents[1]


def test_a_gpu_whose_memory_is_not_told_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's driver says "Not Supported" of it (GB10), or tells the memory of all parts (MIG)."""
    put_gpus(monkeypatch, [None], [(12, 1)])
    found = node_facts.node_info()
    assert found.gpu_generation == (12, 1)
    assert found.gpu_memory is None
    assert preflight.unusable_gpu(replace(found, versions={"torch": "2.13.0+cu130"})) is None
    put_gpus(monkeypatch, [None, 2**34], [(12, 1)] * 2)  # beside it is one that tells its own
    assert node_facts.node_info().gpu_memory is None
    put_gpus(monkeypatch, [2**35, 2**34], [(12, 1)] * 2)
    assert node_facts.node_info().gpu_memory == 2**34
    put_gpus(monkeypatch, [80 * 2**30], [(9, 0)], divided=True)
    assert node_facts.node_info().gpu_memory is None


def put_gpus(
    monkeypatch: pytest.MonkeyPatch,
    memory: list[int | None],
    generations: list[tuple[int, int]],
    divided: bool = False,
) -> None:
    """Have NVIDIA's library tell of these GPUs."""
    from ray._private.thirdparty import pynvml

    def memory_of(handle: int) -> Any:
        if memory[handle] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=memory[handle], free=memory[handle])

    answers = {
        "nvmlInit": lambda: None,
        "nvmlSystemGetCudaDriverVersion": lambda: 12080,
        "nvmlDeviceGetCount": lambda: len(memory),
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetMemoryInfo": memory_of,
        "nvmlDeviceGetMigMode": lambda handle: [int(divided)] * 2,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: generations[handle],
    }
    for name, told in answers.items():
        monkeypatch.setattr(pynvml, name, told)


@pytest.mark.parametrize("given", [{}, {"TOKENIZERS_PARALLELISM": "true", "OURS": "1"}, None])
def test_a_job_may_be_submitted_with_variables_that_the_project_sets_itself(
    given: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ray.init refused both with a traceback that showed every variable of the job, secrets too."""
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray.runtime_env.runtime_env import _merge_runtime_env

    monkeypatch.delenv(RAY_JOB_CONFIG_JSON_ENV_VAR, raising=False)
    assert ray_internals.beside_job(ENVIRONMENT) == ENVIRONMENT
    job = {"working_dir": "gcs://package.zip", "env_vars": given}
    monkeypatch.setenv(
        RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": job, "metadata": {}})
    )
    ours = {"env_vars": ray_internals.beside_job(ENVIRONMENT)}
    merged = _merge_runtime_env({**job, "env_vars": given or {}}, ours)
    assert merged["env_vars"] == {**ENVIRONMENT, **(given or {})}


class TrainController:
    """As Ray Train calls its own."""


@pytest.mark.ray
def test_what_a_running_ray_says(ray_with: Callable[[int], None]) -> None:
    import ray

    ray_with(3)
    (node,) = ray.nodes()
    assert ray_internals.HEAD in node["Resources"]
    assert ray_internals.free_resources()[node["NodeID"]]["CPU"] == 3
    assert ray_internals.draining_nodes() == set()
    assert ray_internals.autoscaler_groups() is None
    only_groups_of_dead_actors_are_freed()
    only_controllers_are_ended()
    the_limits_of_an_autoscaler_are_read()


class Maker:
    """An actor with a placement group."""

    def take(self) -> bool:
        import ray

        self.group = ray.util.placement_group([{"CPU": 1}])
        return bool(self.group.wait(30))


def only_groups_of_dead_actors_are_freed() -> None:
    import ray

    maker = ray.remote(Maker)
    dies, lives = maker.options(num_cpus=0).remote(), maker.options(num_cpus=0).remote()
    ours = ray.util.placement_group([{"CPU": 1}])
    assert ours.wait(30)
    assert ray.get([dies.take.remote(), lives.take.remote()]) == [True, True]
    assert free_abandoned() == 0
    ray.kill(dies)
    until(lambda: free_abandoned() == 1)
    assert free_abandoned() == 0
    until(lambda: ray.available_resources().get("CPU", 0) == 1)


def only_controllers_are_ended() -> None:
    import ray

    others = [ray.remote(kind).options(num_cpus=0).remote() for kind in (TrainController, Maker)]
    ray.get([one.__ray_ready__.remote() for one in others])
    ray_internals.end_train_controllers()

    with pytest.raises(
        ray.exceptions.RayActorError
    ):  # a killed actor still answers until it has heard of it
        until(lambda: ray.get(others[0].__ray_ready__.remote()) and None)
    ray.get(others[1].__ray_ready__.remote())


def the_limits_of_an_autoscaler_are_read() -> None:
    import ray
    from ray.core.generated import autoscaler_pb2

    limits = vars(autoscaler_pb2)["ClusterConfig"]()
    for most in (3, -1):
        group = limits.node_group_configs.add()
        group.resources["CPU"], group.max_count = 4, most
    client = ray._private.worker.global_worker.gcs_client
    client.report_cluster_config(limits.SerializeToString())
    assert ray_internals.autoscaler_groups() == [({"CPU": 4}, 3), ({"CPU": 4}, -1)]


def test_no_other_file_uses_a_private_part_of_ray() -> None:
    private = re.compile(r"\bray(?:\.\w+)*(?:\.| import )(?:_(?!_)\w+|v2|generated)\b")
    using = {file for file in PACKAGE.rglob("*.py") if private.search(file.read_text())}
    assert using == {PACKAGE / "cluster" / "ray_internals.py"}


def test_every_private_part_is_there() -> None:
    found = 0
    for node in ast.walk(ast.parse(Path(ray_internals.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ray":
            for alias in node.names:
                importlib.import_module(node.module)
                try:
                    importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    assert hasattr(importlib.import_module(node.module), alias.name), (
                        f"{node.module}.{alias.name}"
                    )
                found += 1
    assert found > 10


def test_the_coordinator_is_the_one_that_trains_controller_asks_for() -> None:
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client

    ours = default_autoscaling_coordinator.get_or_create_autoscaling_coordinator
    assert autoscaling_coordinator_client.get_or_create_autoscaling_coordinator is ours


def test_a_worker_on_one_of_several_amd_gpus_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own code, with our variables: hidden GPUs would have other numbers than those that Train gives out."""
    from ray._private.accelerators.amd_gpu import AMDGPUAcceleratorManager

    for name in VISIBLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    AMDGPUAcceleratorManager.set_current_process_visible_accelerator_ids(["3"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(8))))  # as Train does
    assert "HIP_VISIBLE_DEVICES" not in os.environ
    assert device_of(["3"], os.environ) == torch.device("cuda", 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "b:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "b:1"}),
    ],
)
def test_the_users_setting_of_torchs_memory_stays(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str]
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert allocator() == expected
