"""Events in other worlds than the matrix's: strategies, stores and numbers of workers. The end is the same bytes."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common import storage
from tests.pipelines import project
from tests.recovery import cluster as clusters
from tests.recovery import hosts, processes, runs
from tests.recovery.cluster import Cluster
from tests.recovery.disturbances import BUSY, send
from tests.recovery.runs import EndState, Fault, Run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WORLDS: dict[str, tuple[int | list[int], str, str, str, str]] = {
    "2 workers": (2, "ddp", "disk", "adamw", "rows"),
    "1 worker": (1, "ddp", "disk", "adamw", "rows"),
    "3 workers, spectral": (3, "ddp", "disk", "spectral", "rows"),
    "[1, 3] workers": ([1, 3], "ddp", "disk", "adamw", "rows"),
    "2 workers, S3": (2, "ddp", "s3", "adamw", "rows"),
    "2 workers, fsdp": (2, "fsdp", "disk", "adamw", "rows"),
    "3 workers, fsdp, S3": (3, "fsdp", "s3", "adamw", "rows"),
    "[1, 3] workers, fsdp, S3, spectral": ([1, 3], "fsdp", "s3", "spectral", "rows"),
    "[1, 3] workers, pairs": ([1, 3], "ddp", "disk", "adamw", "pairs"),
    "2 workers, S3, pairs": (2, "ddp", "s3", "adamw", "pairs"),
    "3 workers, fsdp, pairs": (3, "fsdp", "disk", "adamw", "pairs"),
}
"""Workers, strategy, store, optimizer, and what is trained on: rows, or rows and pairs in the same packs."""
Clean = Callable[[str, str, str], EndState]
EVENTS = ("a worker", "all workers", "SIGSTOP", "the driver", "SIGTERM", "a node")
MIDDLE = Fault("step", "hold", step=5, rank=0, pace=0.1)


@pytest.fixture(scope="module")
def clean(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """What two workers leave that nobody touched, by strategy, optimizer and data."""

    @cache
    def end(strategy: str, optimizer: str, data: str) -> EndState:
        folder = tmp_path_factory.mktemp(f"{strategy}-{optimizer}-{data}")
        changes: dict[str, Any] = {"cluster__strategy": strategy, "train__optimizer": optimizer}
        if data == "pairs":
            changes["data"] = project.with_pairs(tiny_project)
        return runs.run_clean(tiny_project, folder, **changes)

    return end


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("event", EVENTS)
def test_the_bytes_are_those_of_an_undisturbed_run(
    event: str,
    world: str,
    clean: Clean,
    tiny_project: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    workers, strategy, store, optimizer, data = WORLDS[world]
    undisturbed = clean(strategy, optimizer, data)
    changes: dict[str, Any] = {
        "cluster__workers": workers,
        "cluster__strategy": strategy,
        "train__optimizer": optimizer,
    }
    if data == "pairs":
        changes["data"] = project.with_pairs(tiny_project)
    runs_folder = str(tmp_path / "runs")
    if store == "s3":
        runs_folder = request.getfixturevalue("bucket")
        database = tmp_path / "mlflow.db"
        changes |= project.on_s3(tiny_project, runs_folder, database, data == "pairs")
    config = runs.written(tiny_project, tmp_path, **changes)
    with (
        node_cluster(config, store) if event == "a node" else one_machine(config) as (
            run,
            hosts_of_it,
        )
    ):
        run.start()
        pid = int(run.wait_for_fault()["pid"])
        happens(event, run, pid, hosts_of_it)
        code = run.wait()
        while code in BUSY:
            code = run.attempt()
        assert code == 0, run.tail()
    adapter = f"{runs_folder}/small/export/adapter/adapter_model.safetensors"
    assert storage.read_bytes(adapter) == undisturbed.adapter
    assert runs.others(runs_folder) == undisturbed.others


@contextlib.contextmanager
def one_machine(config: Path) -> Iterator[tuple[Run, None]]:
    with processes.scratch() as scratch:
        yield Run(config, scratch, MIDDLE, extra={"HOME": str(scratch)}), None


@contextlib.contextmanager
def node_cluster(config: Path, store: str) -> Iterator[tuple[Run, Cluster]]:
    if store == "s3":
        pytest.skip("the store does not listen in the hosts' network")
    if os.geteuid() != 0 or not hosts.possible():
        pytest.skip("needs root and network namespaces")
    with clusters.cluster(config, MIDDLE) as cluster:
        yield cluster.run, cluster


def happens(event: str, run: Run, pid: int, cluster: Cluster | None) -> None:
    """Let it happen to the worker that stands still, and give the command again where a user has to."""
    standing = next(one for one in processes.workers(run.folder) if one.pid == pid)
    if event == "a node":
        host = cluster.host_of(pid)
        host.kill()
        host.start_ray()
    elif event == "a worker":
        send(standing, signal.SIGKILL)
    elif event == "SIGSTOP":
        send(standing, signal.SIGSTOP)
    elif event == "all workers":
        for worker in processes.workers(run.folder):
            send(worker, signal.SIGKILL)
    elif event == "the driver":
        run.driver.kill()
        assert run.wait() == -signal.SIGKILL, run.tail()
        run.start()
    else:
        run.terminate_driver()
        (run.folder / "release").touch()
        assert run.wait() == 128 + signal.SIGTERM, run.tail()
        run.start()
