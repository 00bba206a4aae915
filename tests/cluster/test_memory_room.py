"""Workers are counted by the memory of their GPUs, and by that of their nodes, which the base goes through."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from olora_ray.adapter.inject import Selection
from olora_ray.cluster import preflight, resources
from olora_ray.cluster.decide import decide, expect
from olora_ray.cluster.node_facts import NodeInfo
from olora_ray.cluster.preflight import (
    COPIES,
    GIB,
    PROCESS_BYTES,
    Answers,
    Node,
    changes,
    memory_problems,
    missing,
    needs,
    stored_as,
)
from olora_ray.config.decided import DecidedConfig, Expected, Kept
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel, obtain
from olora_ray.train.estimate import MemoryEstimate, estimate
from tests import tiny

SIZE = MemoryEstimate(
    {},
    selection=Selection({}, {}),
    trainable=10**6,
    parameters=2 * 10**9,
    base_bytes=4 * 10**9,
    adapter_bytes=0,
    activation_bytes=GIB,
)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["F32", "F16", "BF16"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, BaseModel]:
    """Name of a precision, and a base that is stored in it but for a few numbers."""
    weights = {"large": torch.zeros(64, 4, dtype=request.param), "norm": torch.zeros(4)}
    save_file(weights, tmp_path / "model.safetensors")
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[request.param]
    return name, BaseModel("base", str(tmp_path), "")


def cluster_of(
    monkeypatch: pytest.MonkeyPatch, *nodes: tuple[str, dict[str, float], NodeInfo]
) -> Answers:
    """Have Ray tell of these nodes, which have resources and answer with facts; returns the answers."""
    entries = [{"NodeManagerAddress": address, "Resources": has} for address, has, _ in nodes]
    answers = [(address, info) for address, _, info in nodes]
    told: dict[Any, Any] = {
        (resources, "schedulable_nodes"): lambda: entries,
        (resources, "autoscaler_limits"): list,
        (resources, "free_workers"): lambda wanted: 0,
        (preflight, "_answers"): lambda config, nodes: (answers, []),
    }
    for (module, name), answer in told.items():
        monkeypatch.setattr(module, name, answer)
    return answers


def problems(
    config: DecidedConfig,
    base: BaseModel,
    size: MemoryEstimate,
    expected: Expected,
) -> list[str]:
    nodes = preflight.ask(config).with_room(config.cluster.fewest)
    return list(memory_problems(config, base, size, expected, nodes))


def with_gpus(**changes: Any) -> DecidedConfig:
    return tiny.decided(**({"cluster__gpus_per_worker": 1.0} | changes))


def node(fits: int, memory: float, gpu_memory: float | None = None) -> Node:
    return Node(
        "10.0.0.1", NodeInfo({}, int(memory), None if gpu_memory is None else int(gpu_memory)), fits
    )


def test_a_base_of_another_precision_is_whole_in_memory_while_it_is_loaded(
    base: tuple[str, BaseModel],
) -> None:
    stored, folder = base
    assert stored_as(folder, torch.bfloat16) == stored
    on_gpu, beside = needs(with_gpus(), folder, SIZE, tiny.ON_GPU)
    assert on_gpu.size == SIZE.total_bytes() + PROCESS_BYTES
    wide = with_gpus(cluster__workers=64, train__global_batch=64)
    many, _ = needs(wide, folder, SIZE, tiny.ON_GPU)
    assert many.size - on_gpu.size == 63 * 2**24  # 63 connections of NCCL
    nodes = [node(8, memory=GIB)] * 8
    grouped, _ = needs(wide, folder, SIZE, tiny.ON_GPU, nodes)
    assert (
        grouped.size - on_gpu.size == (7 + 7) * 2**24
    )  # inside a node, and one on each other node
    converted = 0 if stored == "BF16" else 2 * SIZE.parameters
    assert beside.size == PROCESS_BYTES + converted + COPIES * 4 * SIZE.trainable
    assert ("stored in BF16" in str(beside.advice)) == (stored != "BF16")


@pytest.mark.parametrize("base", [torch.float16], indirect=True)
def test_workers_that_fit_on_their_gpus_may_not_fit_on_the_node(
    base: tuple[str, BaseModel],
) -> None:
    on_gpu, beside = needs(with_gpus(), base[1], SIZE, tiny.ON_GPU)
    nodes = [node(8, memory=24 * GIB, gpu_memory=80 * GIB)]
    assert missing(8, on_gpu, nodes) is None
    assert missing(4, beside, nodes) is None
    assert "about 4.7 GiB of CPU memory, so there is room for 5" in missing(8, beside, nodes)
    assert "F16 is converted" in str(beside.advice)


@pytest.mark.parametrize("base", [torch.float16], indirect=True)
def test_only_nodes_with_room_for_workers_are_counted(
    base: tuple[str, BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus, cpus = (
        NodeInfo({"torch": "2.13.0+cpu"}, 24 * GIB, 80 * GIB),
        NodeInfo({"torch": "2.13.0+cpu"}, 999 * GIB),
    )
    nodes = (("10.0.0.1", {"CPU": 8.0, "GPU": 8.0}, gpus), ("10.0.0.2", {"CPU": 64.0}, cpus))
    answers, wanted = cluster_of(monkeypatch, *nodes), {"CPU": 1.0, "GPU": 1.0}
    settings = with_gpus(cluster__workers=8, train__global_batch=8)
    (problem,) = problems(settings, base[1], SIZE, tiny.ON_GPU)
    assert "room for 5 (node 10.0.0.1 has 24.0 GiB)" in problem
    assert problems(with_gpus(cluster__workers=4), base[1], SIZE, tiny.ON_GPU) == []
    too_many = with_gpus(cluster__workers=9, train__global_batch=9)  # told by another check
    assert problems(too_many, base[1], SIZE, tiny.ON_GPU) == []
    (unusable,) = preflight.gpu_problems(wanted, answers)
    assert unusable.startswith("node 10.0.0.1: has GPUs, and torch 2.13.0+cpu")
    assert preflight.gpu_problems({"CPU": 1.0}, answers) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save(folder, num_hidden_layers=6, max_position_embeddings=1024)
    return str(folder)


def sized(
    model: str, again: bool | str, micro: int = 8
) -> tuple[Config, BaseModel, MemoryEstimate]:
    config = tiny.config(
        model__name=model,
        model__dtype="float32",
        train__global_batch=8,
        train__micro_batch=micro,
        train__activation_checkpointing=again,
    )
    found = obtain(config)
    return config, found, estimate(tiny.decided(config), found, tiny.ON_CPU)


def one_node(monkeypatch: pytest.MonkeyPatch, memory: int) -> Answers:
    return cluster_of(monkeypatch, ("10.0.0.1", {"CPU": 1.0}, NodeInfo({}, memory)))


def test_auto_has_blocks_run_again_only_where_a_step_does_not_fit(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, base, plain = sized(model, "auto")
    again = sized(model, again=True)[2]
    between = sized(model, again="swiglu")[2]
    assert again.activation_bytes < plain.activation_bytes / 2
    for memory, wanted in (
        (2 * plain.total_bytes(), False),
        ((plain.total_bytes() + between.total_bytes()) // 2, "swiglu"),
        ((between.total_bytes() + again.total_bytes()) // 2, True),
    ):
        one_node(monkeypatch, memory + PROCESS_BYTES)
        for setting, expected in (("auto", wanted), (False, False), (True, True)):
            config, _, _ = sized(model, setting)
            made = decide(config, tiny.of_data(config), base, preflight.ask(config))
            assert made.config.train.activation_checkpointing is expected
            assert made.size.recompute is expected
            fitting = not problems(made.config, base, made.size, tiny.ON_CPU)
            assert fitting is (expected in (True, wanted))


@pytest.mark.parametrize(
    ("generation", "began", "dtype", "attention"),
    [
        ((7, 5), None, "float32", "sdpa"),
        ((8, 0), None, "bfloat16", "auto"),
        ((8, 0), "float32", "float32", "sdpa"),
        ((7, 5), "bfloat16", "bfloat16", "sdpa"),
    ],
)
def test_auto_is_planned_as_the_gpus_load_it_or_as_the_run_began(
    generation: tuple[int, int] | None,
    began: str | None,
    dtype: str,
    attention: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    young, old = (
        NodeInfo({"torch": None}, GIB, GIB, gpu_generation=each, gpu_names=("A", "A"))
        for each in (generation, (6, 1))
    )
    nodes = (
        ("a", {"CPU": 4.0, "GPU": 1.0}, young),
        ("b", {"CPU": 4.0}, old),
    )  # b offers no GPU to workers
    cluster_of(monkeypatch, *nodes)
    config = with_gpus(run__storage=str(tmp_path))
    asked = preflight.ask(config)
    assert [each.address for each in asked.nodes] == ["a"]
    found = expect(config, asked.nodes, Kept(dtype=began))
    assert (found.dtype, found.attention) == (dtype, attention)
    named = with_gpus(model__dtype="bfloat16", model__attention="eager")
    assert expect(named, asked.nodes) == Expected(True, "bfloat16", "eager", "A")
    other = replace(asked.nodes[0], info=replace(young, gpu_names=("B",)))
    assert expect(named, [*asked.nodes, other]).card == ""
    on_cpu = expect(tiny.decided(), asked.nodes)
    assert (on_cpu.gpu, on_cpu.attention) == (False, "auto")


def test_a_refusal_names_the_change_that_makes_it_fit(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = sized(model, again=True, micro=2)[2].total_bytes()
    one_node(monkeypatch, room + PROCESS_BYTES)
    for setting, words in (
        (False, "train.activation_checkpointing=true, train.micro_batch=2"),
        (True, "train.micro_batch=2"),
    ):
        config, base, size = sized(model, setting)
        (problem,) = problems(tiny.decided(config), base, size, tiny.ON_CPU)
        assert problem.endswith(f"; it fits with {words}")
    one_node(monkeypatch, PROCESS_BYTES)
    (problem,) = problems(tiny.decided(config), base, size, tiny.ON_CPU)
    assert "; use nodes with more memory or a smaller model: none of" in problem


@pytest.mark.parametrize(
    "settings",
    [
        {"model__quantization": "fp8"},
        {"cluster__strategy": "fsdp", "cluster__workers": 4, "cluster__fsdp_replicas": 2},
        {
            "model__dtype": "float32",
            "data__eval_fraction": 0.1,
            "evaluation__scorer": "exact_match",
        },
    ],
    ids=str,
)
def test_every_change_that_may_be_advised_is_one_that_can_be_made(settings: dict[str, Any]) -> None:
    """Where one is refused, the refusal of the memory would be a line about a field that nobody has set."""
    config = tiny.decided(**({"cluster__workers": 2} | settings))
    made = [override(config, change) for change in changes(config, tiny.ON_CPU)]
    assert made[-1] != config
