"""The defaults on GPUs: each has a worker and as much work as fits; what others hold of it is seen."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olora_ray.cluster import node_facts, preflight, resources
from olora_ray.cluster.decide import decide
from olora_ray.cluster.node_facts import NodeInfo
from olora_ray.config.decided import Kept
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel, obtain
from tests import tiny
from tests.pipelines import project
from tests.refused import refused
from tests.said import said

GIB = 2**30


@pytest.fixture
def config(tmp_path: Path) -> Config:
    tiny.save(tmp_path / "llama", max_position_embeddings=1024)
    given = tiny.config(
        model__name=str(tmp_path / "llama"),
        train__global_batch=16,
        run__storage=str(tmp_path / "runs"),
    )
    return override(
        given,
        {"cluster.workers": "auto", "train.micro_batch": "auto", "cluster.gpus_per_worker": 1},
    )


def machine(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    free: float = 80.0,
    busy: int = 0,
    seen: int | None = None,
    **facts: Any,
) -> None:
    """Have Ray tell of one node with GPUs of 80 GiB, of which some are busy and one has `free` GiB.

    `seen` are the bytes that torch sees of a GPU, `facts` other facts of the node.
    """
    here = node_facts.node_info()
    info = NodeInfo(
        here.versions, 999 * GIB, 80 * GIB, None, (9, 0), 13, 13, int(free * GIB), (4711,)
    )
    node = {
        "NodeManagerAddress": "10.0.0.1",
        "NodeID": "a",
        "Resources": {"CPU": 64.0, "GPU": float(gpus)},
    }
    info = replace(info, **facts)
    told: dict[Any, Any] = {
        (node_facts, "node_info"): lambda *_: info,
        (node_facts, "gpu_memory_of"): lambda nodes, _: [seen] * len(nodes),
        (resources, "schedulable_nodes"): lambda: [node],
        (resources, "autoscaler_limits"): list,
        (resources.ray_internals, "free_resources"): lambda: {
            "a": {"CPU": 64.0, "GPU": float(gpus - busy)}
        },
        (preflight, "gpu_problems"): lambda *_: [],
    }
    for (module, name), answer in told.items():
        monkeypatch.setattr(module, name, answer)


@pytest.mark.parametrize(
    ("gpus", "busy", "workers", "micro"),
    [(1, 0, 1, 16), (3, 0, 3, 6), (8, 0, 8, 2), (32, 0, 32, 1), (8, 3, (5, 8), 2)],
)
def test_every_gpu_has_an_equal_part_of_a_step(
    config: Config, monkeypatch: pytest.MonkeyPatch, gpus: int, busy: int, workers: Any, micro: int
) -> None:
    machine(monkeypatch, gpus, busy=busy)
    base, cluster = obtain(config), preflight.ask(config)
    data = tiny.of_data(config)
    made = decide(config, data, base, cluster)
    found = made.config
    assert (found.cluster.workers, found.train.micro_batch) == (workers, micro)
    assert made.decisions["train.micro_batch"].why
    assert decide(config, data, base, cluster, trial=True).config.cluster.workers == 1
    assert decide(found, tiny.of_data(found), base, cluster).config == found
    kept = Kept({"train.micro_batch": 7})
    assert decide(config, data, base, cluster, kept).config.train.micro_batch == 7


@pytest.fixture(scope="module")
def of_8b(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Llama-3.1-8B without its numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(project.ROOT / "benchmarks")
        common = importlib.import_module("common")
    shape = common.llama_shape(128256, 4096, 14336, 32, 32, 8)
    found: BaseModel = common.hollow(tmp_path_factory.mktemp("8b") / "model", "llama", shape)
    return found


@pytest.mark.parametrize(
    ("told", "seen", "generation"),
    [
        pytest.param(80.0, None, (9, 0), id="H100"),
        pytest.param(None, 19.5, (9, 0), id="MIG 1g.20gb"),
        pytest.param(None, 64.0, None, id="AMD"),
        pytest.param(None, None, None, id="AMD, all busy"),
        pytest.param(22.5, None, (8, 6), id="A10G"),
        pytest.param(15.0, None, (7, 5), id="T4"),
    ],
)
def test_a_plan_takes_no_more_than_the_gpu_has(
    monkeypatch: pytest.MonkeyPatch,
    of_8b: BaseModel,
    told: float | None,
    seen: float | None,
    generation: tuple[int, int] | None,
) -> None:
    config = tiny.config(
        model__name=of_8b.folder,
        train__global_batch=16,
        train__micro_batch="auto",
        cluster__gpus_per_worker=1,
        data__max_length=2048,
    )
    known, found = (None if each is None else int(each * GIB) for each in (told, seen))
    facts: dict[str, Any] = {"gpu_memory": known, "gpu_generation": generation, "gpu_free": None}
    machine(monkeypatch, gpus=1, seen=found, **facts)
    cluster = preflight.ask(config)
    made = decide(config, tiny.of_data(config), of_8b, cluster)
    planned = made.size.total_bytes() + preflight.PROCESS_BYTES
    refused = [
        *preflight.memory_problems(made.config, of_8b, made.size, made.expected, cluster.nodes)
    ]
    card = told or seen
    if card is None:
        train = made.config.train
        assert (train.micro_batch, train.activation_checkpointing) == (1, True)
        assert not refused
    else:
        assert bool(refused) == (planned > card * GIB)
        assert bool(refused) == (card < 16)


def _require(config: Config) -> None:
    base, cluster = obtain(config), preflight.ask(config)
    made = decide(config, tiny.of_data(config), base, cluster)
    preflight.require(made.config, cluster, base, made.size, made.expected)


def test_other_processes_on_a_gpu_are_named_and_their_memory_is_not_planned_with(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 1, free=0.5)
    with (
        said() as lines,
        refused("GPU memory, so there is room for 0"),
    ):
        _require(config)
    assert any(
        "other processes (4711) leave 0.5 of 80.0 GiB on a GPU: stop them" in line for line in lines
    )
