"""Two runs share a cluster that is full with their workers, while the tokens of both are not finished."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_head import free_port
from tests.recovery import processes, runs
from tests.recovery.runs import Fault, Run
from tests.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def address() -> Iterator[str]:
    """A Ray with two CPUs."""
    with processes.scratch() as folder:
        port = free_port()
        command = [Path(sys.executable).parent / "ray", "start", "--head", f"--port={port}"]
        command += ["--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false"]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}"]
        environment = runs.environment(folder, Fault("shard", step=99)) | {
            "RAY_AUTH_MODE": "disabled"
        }
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=180)
        yield f"127.0.0.1:{port}"


def test_two_runs_on_two_cpus_both_end(
    address: str, tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    # Others leave room for one worker, and then for both, but never the half CPU of a token task.
    changes = {"cluster__workers": 1, "cluster__cpus_per_worker": 0.4}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(address=address, log_to_driver=False)
    others = [placement_group([{"CPU": cpus}]) for cpus in (1.2, 0.4)]
    assert all(group.wait(60) for group in others)
    started = []
    try:
        with processes.scratch() as folder:
            for name in ("a", "b"):
                for place in (folder / name, tmp_path / name):
                    place.mkdir()
                config = runs.written(tiny_project, tmp_path / name, run__name=name, **changes)
                # Its shards are small, and tasks of Ray Data make them.
                run = Run(config, folder / name, Fault("shard", step=99))
                run.extra = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
                run.start()
                started.append(run)
            until(lambda: ray.available_resources().get("CPU", 0.0) < 0.3, 120)
            remove_placement_group(others[1])
            for run in started:
                assert run.wait(240) == 0, run.tail()
    finally:
        ray.shutdown()
