"""From nothing to nights on a cluster over ssh, with nothing called localhost, as the pages say it.

The order counts: each test continues from what the tests before it have left.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.outside import cluster, world
from tests.outside.cluster import submitted
from tests.outside.world import Machine, World
from tests.pipelines import project
from tests.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 1500
"""So many that something can happen meanwhile."""
ADAPTER = "export/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def outside() -> Iterator[World]:
    if why := world.missing():
        pytest.skip(why)
    with world.world(*world.NUMBERS) as found:
        cluster.bring_up(found)
        yield found


@pytest.fixture(scope="module")
def laptop(outside: World) -> Machine:
    return outside.machines["laptop"]


@pytest.fixture(scope="module")
def head(outside: World) -> Machine:
    return outside.machines["head"]


@pytest.fixture(scope="module")
def config(outside: World) -> Path:
    """A config of a run with two workers in a folder that all machines see."""
    project.make_tiny(outside.shared)
    changes: dict[str, Any] = {
        "cluster": {"workers": 2, "cpus_per_worker": 1},
        "train__checkpoint_every": 100,
    }
    changes |= {
        "train__steps": STEPS,
        "train__eval_every": STEPS,
        "train__log_every": 50,
        "evaluation__scorer": None,
    }
    tree = project.settings(outside.shared, outside.shared / "model", **changes)
    return project.write_config(outside.shared, tree)


def reached(log: Path, step: int) -> bool:
    return f"step {step}/{STEPS}" in log.read_text()


def adapter(outside: World, run: str) -> str:
    return hashlib.sha256((outside.shared / "runs" / run / ADAPTER).read_bytes()).hexdigest()


def test_a_first_run_by_plain_http(outside: World, laptop: Machine, config: Path) -> None:
    uri = "tracking.uri=http://mlflow.internal:5000"
    log = submitted(laptop, "pipelines/finetune.py", str(config), "run.name=first", uri)
    assert "registered:           small version 1 (models:/small@candidate)" in log
    assert "3 node(s)" in log
    assert "Adding" not in log  # the autoscaler's lines would fill each job's log
    assert outside.password not in log


def test_a_run_is_the_same_whatever_dies(
    outside: World, laptop: Machine, head: Machine, config: Path
) -> None:
    """The database goes and comes back, a machine loses its power, the driver is killed, another checkout resumes."""
    words = ("pipelines/finetune.py", str(config), "run.name=killed")
    process, log = cluster.submit(laptop, *words)
    until(lambda: reached(log, 200), 240, pause=0.5)
    outside.stop_server("database")
    until(lambda: reached(log, 350), 120, pause=0.5)
    outside.database()

    victim = next(
        each for each in outside.machines.values() if cluster.pids(each, "RayTrainWorker")
    )
    victim.kill()
    until(lambda: "training continues" in log.read_text(), 300, pause=1)
    outside.machine(victim.name)
    until(lambda: reached(log, 800), 240, pause=0.5)

    head.ok("pkill -KILL -f '[p]ipelines/finetune.py'")
    assert process.wait(240) != 0
    cluster.check_out(laptop, "another_checkout")
    again = submitted(laptop, *words, folder="another_checkout")
    assert "training continues after step" in again
    assert "registered:           small version 2" in again
    assert adapter(outside, "killed") == adapter(outside, "first")
    until(
        lambda: cluster.nodes(outside) == cluster.NODES, 300, pause=5
    )  # the machine is a node again, by itself


def test_a_search_on_an_object_store(laptop: Machine, config: Path) -> None:
    words = f"pipelines/sweep.py {config} tune_spaces/smoke.yaml --register run.name=search"
    words += " run.storage=s3://runs/searches cluster.workers=1 registry.model=searched"
    log = submitted(laptop, *words.split())
    assert "searched version 1" in log


@pytest.fixture(scope="module")
def night(outside: World, head: Machine, config: Path) -> Callable[..., tuple[int, str]]:
    """`night(**variables)`: the line of deploy/crontab on the head, as cron would call it: exit code and mail."""
    cluster.check_out(head, "checkout")
    ours = outside.machines["laptop"].folder / "root/olora_ray/deploy/cluster.env"
    (head.folder / "root/checkout/deploy/cluster.env").write_text(ours.read_text())
    (outside.shared / "hook").write_text("http://hooks.internal:8000/retraining")
    tree = yaml.safe_load(config.read_text())
    tree["train"] |= {"steps": 20, "eval_every": 20}
    tree |= {
        "registry": {"model": "nightly"},
        "gate": {"min_rows": 5, "guard": None},
        "notify": {"url": f"file:{outside.shared}/hook"},
    }
    file = project.write_config(outside.shared, tree, "nightly.yaml")

    def call(**variables: str) -> tuple[int, str]:
        lines = (head.folder / "root/checkout/deploy/crontab").read_text().splitlines()
        settings = dict(line.split("=", 1) for line in lines if re.match("[A-Z_]+=", line))
        settings |= {"PROJECT": "/root/checkout", "BIN": "/root/olora_env/bin"}
        settings |= {"LOG": "/root/retrain.log", "PATH": "/usr/bin:/bin"}
        command = lines[-1].split(maxsplit=5)[5]
        command = command.replace("deploy/night.py", "deploy/night.py --pause 2 --tries 2")
        done = head.run(command, **settings, CONFIG=str(file), **variables)
        return done.returncode, done.stdout

    return call


def test_nights_are_told_with_their_decision_or_their_cause(
    outside: World, head: Machine, night: Callable[..., tuple[int, str]]
) -> None:
    assert night() == (0, "")
    assert (outside.heard[-1]["event"], outside.heard[-1]["version"]) == ("promoted", "1")
    told = len(outside.heard)
    assert night() == (0, "")  # nothing changed
    assert len(outside.heard) == told
    said = head.ok(
        "cd checkout && set -a && . deploy/cluster.env && python pipelines/registry.py list nightly"
    )
    assert "champion" in said

    outside.stop_server("nginx")  # MLflow does not answer
    code, mail = night()
    assert (code, outside.heard[-1]["event"]) == (75, "not finished")
    assert "no MLflow server answers" in mail
    outside.nginx()

    credentials = head.folder / "root/.mlflow/credentials"
    right = credentials.read_text()
    credentials.write_text(right.replace(outside.password, "wrong"))
    code, mail = night()
    assert (code, outside.heard[-1]["event"]) == (2, "failed")
    assert "refuses access" in outside.heard[-1]["reason"] + mail
    credentials.write_text(right)
    assert outside.password not in json.dumps(outside.heard) + mail
