"""A run on two nodes that have Python and Ray alone: the job brings the rest (deploy/runtime_env.yaml)."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.outside import cluster, world
from tests.outside.world import ROOT, World
from tests.pipelines import project
from tests.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RAY = "/mnt/bare/bin"


@pytest.fixture(scope="module")
def bare() -> Iterator[World]:
    """Two nodes whose Python has Ray; wheels lie on a disk, since these machines reach no package index."""
    if why := world.missing():
        pytest.skip(why)
    with world.world("head", "worker1", "laptop") as found:
        pip = [sys.executable, "-m", "pip", "download", "-q", "-d", str(found.shared / "wheels")]
        subprocess.run([*pip, ".[gguf,s3]", "setuptools>=77", "uv"], cwd=ROOT, check=True)
        head, worker, laptop = (found.machines[name] for name in ("head", "worker1", "laptop"))
        head.ok(
            f"python3.11 -m venv /mnt/bare && {RAY}/pip install -q --no-index --find-links /mnt/wheels 'ray[default]'"
        )
        variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/mnt/wheels", "UV_OFFLINE": "1"}
        variables |= {
            "UV_FIND_LINKS": "/mnt/wheels",
            "GLOO_SOCKET_IFNAME": "eth0",
            "PATH": f"{RAY}:/usr/bin:/bin",
        }
        head.ok(
            "ray start --head --node-ip-address head --num-cpus 1 --dashboard-host 127.0.0.1",
            **variables,
        )
        worker.ok("ray start --address head:6379 --num-cpus 1", **variables)
        cluster.check_out(laptop, "olora_ray")
        laptop.start("ssh -N -L 8265:127.0.0.1:8265 head", "tunnel.log")
        until(lambda: laptop.run("exec 3<>/dev/tcp/127.0.0.1/8265").returncode == 0, 60, pause=1)
        project.make_tiny(found.shared)
        yield found


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_a_job_brings_its_packages(bare: World, tool: str) -> None:
    laptop, shared = bare.machines["laptop"], bare.shared
    tree = project.settings(
        shared, shared / "model", cluster={"workers": 2, "cpus_per_worker": 1}, run__name=tool
    )
    file: Path = project.write_config(shared, tree)
    environment = laptop.folder / "root" / "olora_ray" / "deploy" / "runtime_env.yaml"
    wanted = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())
    environment.write_text(yaml.safe_dump({tool: wanted.pop("pip"), **wanted}))
    line = "ray job submit --working-dir . --runtime-env deploy/runtime_env.yaml -- python pipelines/finetune.py"
    for name in (tool, f"{tool}-again"):
        began = time.monotonic()
        done = laptop.run(
            f"cd olora_ray && {line} {file} run.name={name}",
            1800,
            RAY_ADDRESS="http://127.0.0.1:8265",
        )
        print(f"{name}: {time.monotonic() - began:.0f} s")
        print(done.stdout[-6000:])
        assert done.returncode == 0
        assert "2 node(s)" in done.stdout
        assert "registered: " in done.stdout
