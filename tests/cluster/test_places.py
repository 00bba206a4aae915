"""A node that dies under one of several workers: Ray stays quiet, and another node takes the worker."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.cluster.membership import places as own_places
from olora_ray.cluster.membership.train_backend import InPlace
from tests.recovery import processes
from tests.waiting import until

pytestmark = pytest.mark.ray

QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 5}
SMALL = 100 * 2**20
"""Bytes of an object store."""
QUIET = 20
"""Tries to place what is missing in two seconds: Ray makes some hundred thousand of a group with a hole in it."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of a head without CPUs and two nodes with one each."""
    with processes.scratch() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {"AUTH_MODE": "disabled", "USAGE_STATS_ENABLED": "0", "TMPDIR": str(folder)}.items():
            patch.setenv(f"RAY_{name}", value)
        import ray
        from ray.cluster_utils import Cluster

        ray.shutdown()
        small = {"include_dashboard": False, "object_store_memory": SMALL}
        found: Any = Cluster(True, head_node_args={"num_cpus": 0, "_system_config": QUICK, **small})
        for _ in range(2):
            found.add_node(num_cpus=1, object_store_memory=SMALL)
        ray.init(found.address, log_to_driver=False)
        yield found
        ray.shutdown()
        found.shutdown()


def _work(config: dict[str, Any]) -> None:
    import time

    import ray
    import ray.train

    folder, rank = Path(config["folder"]), ray.train.get_context().get_world_rank()
    told = json.dumps([rank, ray.get_runtime_context().get_node_id(), os.getpid()])
    (folder / f"{os.getpid()}.tmp").write_text(told)
    (folder / f"{os.getpid()}.tmp").rename(folder / f"{os.getpid()}.json")
    while not (folder / "end").exists():
        time.sleep(0.1)


def _tries() -> int:
    from ray.util.placement_group import placement_group_table

    return sum(group["stats"]["scheduling_attempt"] for group in placement_group_table().values())


class Process:
    """As Ray Train's worker."""

    def get_metadata(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())


def test_a_worker_on_its_way_to_a_node_that_dies_goes_to_another(nodes: Any) -> None:
    import ray
    from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
    from ray.util.placement_group import placement_group

    one: Any = {"CPU": 1.0}
    places = own_places.Places(DefaultPlacementGroupHandle(placement_group([one, one])), one)
    assert places.wait(30)
    kind = ray.remote(num_cpus=1)(Process)
    here = {number: node for number, (_, node) in own_places.start(kind, places, [0, 1]).items()}
    assert set(here.values()) == {node.node_id for node in nodes.worker_nodes}
    dies = next(node for node in nodes.worker_nodes if node.node_id == here[1])
    dies.all_processes["raylet"][0].process.send_signal(signal.SIGSTOP)  # it does not start anything any more
    with ThreadPoolExecutor(1) as thread:
        started = thread.submit(own_places.start, kind, places, [1])
        threading.Event().wait(1)
        nodes.remove_node(dies, allow_graceful=False)
        joined = nodes.add_node(num_cpus=1, object_store_memory=SMALL)
        assert started.result(60)[1][1] == joined.node_id
    places.shutdown()
    until(lambda: ray.available_resources().get("CPU", 0) == 2)


def test_a_worker_whose_node_is_gone_waits_quietly_for_another(nodes: Any, tmp_path: Path) -> None:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    def started() -> list[tuple[int, str, int]]:
        return [tuple(json.loads(file.read_text())) for file in sorted(tmp_path.glob("*.json"))]

    def alive() -> int:
        return sum(node["Alive"] for node in ray.nodes())

    made: Any = ray.train
    torch_config: Any = InPlace()
    trainer = own_places.with_own_places(
        TorchTrainer(
            _work,
            train_loop_config={"folder": str(tmp_path)},
            torch_config=torch_config,
            scaling_config=made.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=made.RunConfig(
                name="here", storage_path=str(tmp_path / "runs"), failure_config=made.FailureConfig(max_failures=-1)
            ),
        )
    )
    thread = threading.Thread(target=trainer.fit, daemon=True)
    thread.start()
    until(lambda: len(started()) == 2, 60)
    first = next(one for one in started() if one[0] == 0)
    _, lost, _ = next(one for one in started() if one[0] == 1)
    dies = next(node for node in nodes.list_all_nodes() if node.node_id == lost)
    nodes.remove_node(dies, allow_graceful=False)
    until(lambda: alive() == 2, 60)
    threading.Event().wait(3)
    before = _tries()
    threading.Event().wait(2)
    assert _tries() - before < QUIET
    known = {one[2] for one in started()}
    joined = nodes.add_node(num_cpus=1, object_store_memory=SMALL)
    until(lambda: {one[2] for one in started()} - known, 60)
    assert [one[:2] for one in started() if one[2] not in known] == [(1, joined.node_id)]
    os.kill(first[2], 0)  # the other one has gone on
    (tmp_path / "end").touch()
    thread.join(60)
    assert not thread.is_alive()
    until(lambda: ray.available_resources().get("CPU", 0) == 2)


def test_a_node_that_dies_before_a_place_is_tied_to_it_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Any] = []
    table = {"bundles_to_node_id": {0: "a" * 56, 1: ""}}
    monkeypatch.setattr(own_places, "placement_group_table", lambda group: table)
    monkeypatch.setattr(own_places, "remove_placement_group", removed.append)
    together: Any = SimpleNamespace(wait=lambda seconds: True, placement_group="both")
    assert not own_places.Places(together, {"CPU": 1}).wait(30)
    assert removed == ["both"]
