"""A run on a cluster that has no node for it yet: the autoscaler starts them, and the run waits for it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.pipelines import project
from tests.recovery import processes

PORT = 26679
LIMITS = {
    "cluster_name": "growing",
    "max_workers": 2,
    "idle_timeout_minutes": 5,
    "provider": {
        "type": "fake_multinode",
        "gcs_address": f"127.0.0.1:{PORT}",
        "use_node_id_as_ip": True,  # all have the same
        "disable_node_updaters": True,  # they need no SSH
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",  # the provider's own name for it
    "upscaling_speed": 1.0,
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{name: [] for name in ("initialization_commands", "setup_commands", "cluster_synced_files")},
    **{
        f"{role}_{what}": []
        for role in ("head", "worker")
        for what in ("setup_commands", "start_ray_commands")
    },
    **{name: [] for name in ("rsync_exclude", "rsync_filter")},
    "file_mounts_sync_continuously": False,
}
"""Ray's autoscaler with a provider whose nodes are processes of this machine."""


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A head without CPUs, and an autoscaler that may start two nodes of one."""
    with processes.scratch() as folder:
        file = folder / "ray_bootstrap_config.yaml"
        file.write_text(yaml.safe_dump(LIMITS))
        for name, value in {
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
        }.items():
            monkeypatch.setenv(name, value)
        command = [
            "start",
            "--head",
            f"--port={PORT}",
            "--node-ip-address=127.0.0.1",
            "--num-cpus=0",
        ]
        command += [
            f"--autoscaling-config={file}",
            f"--temp-dir={folder}",
            "--object-store-memory=100000000",
        ]
        environment = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        subprocess.run(
            [Path(sys.executable).parent / "ray", *command],
            env=environment,
            check=True,
            capture_output=True,
            timeout=120,
        )
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{PORT}")
        yield folder


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_gets_the_nodes_that_it_waits_for(head: Path, tiny_model: Path, corpus: Path) -> None:
    tree = project.settings(
        corpus, tiny_model, cluster__workers=[2, 3], cluster__cpus_per_worker=1, train__steps=4
    )
    tree |= {"evaluation": {"samples": 0}, "registry": {}}
    done = project.finetune(project.write_config(corpus, tree), code=0)
    assert "training waits for the cluster to grow: cluster.workers=2 " in done.stdout
    assert "training starts with 2 workers" in done.stdout
    assert "step 4/4 | loss" in done.stdout
    too_many = project.finetune(
        project.write_config(corpus, tree), "run.name=larger", "cluster.workers=4", code=2
    )
    assert "cluster.workers=4 with cpus_per_worker=1: the cluster has room for " in too_many.stderr
