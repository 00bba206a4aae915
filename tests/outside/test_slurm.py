"""deploy/slurm on a real Slurm: a controller and two nodes on machines of a world outside."""

import base64
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.outside import cluster, world
from tests.outside.test_cluster import adapter
from tests.outside.world import Machine, World
from tests.pipelines import project
from tests.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 400
SLURM = {
    "SLURM_CONF": "/mnt/slurm/slurm.conf",
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
}
# One core per node, so that a run with two workers needs both.
CONF = """ClusterName=tiny
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/slurm
CredType=auth/slurm
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/run/slurmd
StateSaveLocation=/mnt/slurm/state
SlurmdTimeout=20
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=head,worker1 CPUs=1 Gres=gpu:1
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[World]:
    if why := world.missing() or (
        not shutil.which("slurmctld") and "needs slurmctld, slurmd and slurm-client"
    ):
        pytest.skip(why)
    with world.world("head", "worker1", servers=False) as found:
        folder = found.shared / "slurm"
        (folder / "state").mkdir(parents=True)
        (folder / "slurm.conf").write_text(CONF)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # there is no GPU
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (folder / "slurm.key").write_bytes(base64.b64encode(secrets.token_bytes(32)))
        (folder / "slurm.key").chmod(0o600)
        found.machines["head"].ok("slurmctld -L /mnt/slurm/slurmctld.log", **SLURM)
        for machine in found.machines.values():
            join(machine)
        cluster.check_out(found.machines["head"], "/mnt/olora_ray")
        project.make_tiny(found.shared)
        yield found


def join(machine: Machine) -> None:
    machine.ok(f"slurmd -N {machine.name} -L /mnt/slurm/{machine.name}.log", **SLURM)


@pytest.fixture(scope="module")
def config(slurm: World) -> Path:
    changes: dict[str, Any] = {
        "cluster": {"workers": 2, "cpus_per_worker": 1},
        "train__checkpoint_every": 25,
    }
    changes |= {
        "train__steps": STEPS,
        "train__eval_every": STEPS,
        "train__log_every": 10,
        "evaluation__scorer": None,
    }
    return project.write_config(
        slurm.shared, project.settings(slurm.shared, slurm.shared / "model", **changes)
    )


class Job:
    """A submission of a file of deploy/slurm."""

    def __init__(self, slurm: World, file: str, *words: str) -> None:
        self.head = slurm.machines["head"]
        said = self.head.ok(
            f"cd /mnt/olora_ray && sbatch deploy/slurm/{file} {' '.join(words)}", **SLURM
        )
        self.number = said.split()[-1]

    @property
    def log(self) -> str:
        files = self.head.folder.parent.glob(f"shared/olora_ray/*-{self.number}.log")
        return "".join(file.read_text(errors="replace") for file in files)

    def state(self) -> str:
        shown = self.head.ok(f"scontrol show job {self.number}", **SLURM)
        return (
            re.findall(r"JobState=(\w+)", shown)[0] + " " + re.findall(r"ExitCode=(\S+)", shown)[0]
        )

    def trained(self, beyond: str, steps: int = 30) -> bool:
        """True if it has trained some steps after the part of the log that is known."""
        numbers = [
            int(number) for number in re.findall(rf"step (\d+)/{STEPS}", self.log[len(beyond) :])
        ]
        return len(numbers) > 1 and numbers[-1] - numbers[0] >= steps

    def ended(self) -> bool:
        return self.state().split()[0] not in ("PENDING", "RUNNING", "COMPLETING")

    def resumed(self, seen: str) -> None:
        """Wait until it has trained on after an interruption; Slurm would let a requeued job wait two minutes."""
        update = f"scontrol update JobId={self.number} StartTime=now"
        until(
            lambda: (
                self.state().startswith("PENDING") and not self.head.run(update, **SLURM).returncode
            ),
            60,
            pause=1,
        )
        until(lambda: self.trained(seen), 400, pause=1)


def test_a_run_on_two_nodes_is_registered(slurm: World, config: Path) -> None:
    job = Job(slurm, "finetune.sbatch", str(config), "run.name=first")
    until(job.ended, 400, pause=2)
    assert job.state() == "COMPLETED 0:0", job.log[-6000:]
    assert "2 node(s)" in job.log
    assert "registered:           small version 1" in job.log


def test_requeue_preemption_notice_cancel_and_a_lost_node_change_no_byte(
    slurm: World, config: Path
) -> None:
    head = slurm.machines["head"]
    words = ("finetune.sbatch", str(config), "run.name=disturbed")
    job = Job(slurm, *words)
    until(lambda: job.trained(""), 400, pause=1)
    # The signal that comes before the time limit: one more checkpoint, then a requeue.
    seen = job.log
    head.ok(f"scancel --signal=USR1 --batch {job.number}", **SLURM)
    until(lambda: "stopped after step" in job.log or job.state().startswith("PENDING"), 60, pause=1)
    job.resumed(seen)
    for disturb in (
        f"scontrol requeue {job.number}",
        "sbatch -p urgent -N2 --output=/dev/null --wrap 'sleep 5'",
    ):
        seen = job.log
        head.ok(disturb, **SLURM)
        until(lambda: not job.state().startswith("RUNNING"), 60, pause=1)
        job.resumed(seen)
    seen = job.log
    slurm.machines["worker1"].kill()
    until(lambda: not job.state().startswith("RUNNING"), 120, pause=1)
    join(slurm.machine("worker1"))
    job.resumed(seen)
    head.ok(f"scancel {job.number}", **SLURM)
    until(job.ended, 60, pause=1)
    again = Job(slurm, *words)
    until(again.ended, 600, pause=2)
    assert again.state() == "COMPLETED 0:0", again.log[-6000:]
    assert job.log.count("training continues after step") >= 4
    assert adapter(slurm, "disturbed") == adapter(slurm, "first")


def test_an_error_of_the_config_is_the_jobs_exit_code_and_a_night_submits_the_next(
    slurm: World, config: Path
) -> None:
    tree = yaml.safe_load(config.read_text())
    night = config.with_name("night.yaml")
    night.write_text(yaml.safe_dump(tree | {"train": {"stepss": 1}}))
    job = Job(slurm, "retrain.sbatch", str(night))
    until(job.ended, 200, pause=2)
    assert job.state() == "FAILED 2:0"
    waiting = slurm.machines["head"].ok(
        "squeue --noheader --name=olora-retrain --format='%T %r'", **SLURM
    )
    assert waiting.startswith("PENDING")


def test_a_search_and_a_night_register_their_versions(slurm: World, config: Path) -> None:
    space = config.with_name("space.yaml")
    steps = {"train.steps": 20, "train.eval_every": 20}
    space.write_text(
        yaml.safe_dump(
            {"search": {"train.lr": {"grid": [1e-2, 1e-3]}}, "searcher": "grid", "set": steps}
        )
    )
    search = Job(
        slurm, "sweep.sbatch", str(config), str(space), "--register", "registry.model=searched"
    )
    until(search.ended, 600, pause=2)
    assert search.state() == "COMPLETED 0:0", search.log[-6000:]
    assert "registered: searched version 1 " in search.log
    words = ("registry.model=nightly", *(f"{key}={number}" for key, number in steps.items()))
    night = Job(slurm, "retrain.sbatch", str(config), *words)
    until(night.ended, 600, pause=2)
    log = (slurm.shared / "olora_ray" / "olora-retrain.log").read_text(errors="replace")
    assert night.state() == "COMPLETED 0:0", log[-6000:]
    assert re.search("registered: +nightly version 1 ", log)
