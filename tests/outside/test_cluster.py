"""From nothing to the fourth night on a cluster over ssh, with nothing called localhost, as the pages say it.

The order counts: each test continues from what the tests before it have left.
"""

import hashlib
import json
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.outside import cluster, scenario, world
from tests.outside.cluster import submitted
from tests.outside.world import ROOT, Machine, World
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


def test_a_spot_notice_moves_the_training_to_another_node(
    outside: World, laptop: Machine, config: Path
) -> None:
    """The watcher of deploy/ with a stand-in for EC2's metadata service, which has the notice in mid-run."""
    process, log = cluster.submit(laptop, "pipelines/finetune.py", str(config), "run.name=spot")
    until(lambda: reached(log, 200), 240, pause=0.5)
    victim = next(
        each for each in outside.machines.values() if cluster.pids(each, "RayTrainWorker")
    )
    victim.start(f"python3 {ROOT}/tests/deploy/metadata.py ec2 8169 /tmp", "metadata.log")
    variables = (
        "export METADATA_URL=http://127.0.0.1:8169 PATH=~/olora_env/bin:$PATH RAY_AUTH_MODE=token"
    )
    victim.start(f"{variables}; sleep 2; bash olora_ray/deploy/watch_node.sh", "watch.log")
    until(lambda: "watching" in (victim.folder / "watch.log").read_text(), 30)
    victim.ok("touch /tmp/notice")
    assert process.wait(600) == 0, log.read_text()[-6000:]
    assert "is preempted" in log.read_text()
    assert adapter(outside, "spot") == adapter(outside, "first")
    until(lambda: cluster.nodes(outside) == cluster.NODES, 400, pause=5)


def test_a_search_on_an_object_store(laptop: Machine, config: Path) -> None:
    words = [
        "pipelines/sweep.py",
        str(config),
        "tune_spaces/smoke.yaml",
        "--register",
        "run.name=search",
    ]
    log = submitted(
        laptop,
        *words,
        "run.storage=s3://runs/searches",
        "cluster.workers=1",
        "registry.model=searched",
    )
    assert "searched version 1" in log


class Nights:
    """The line of deploy/crontab on the head, as cron would call it, and what came of it."""

    def __init__(self, outside: World) -> None:
        self.outside, self.head = outside, outside.machines["head"]
        self.played = scenario.quick(outside.shared / "nights")
        tree = yaml.safe_load(self.played.config.read_text())
        (outside.shared / "hook").write_text("http://hooks.internal:8000/retraining")
        tree["notify"] = {"url": f"file:{outside.shared}/hook"}
        tree["train"]["log_every"] = 10
        self.played.config.write_text(yaml.safe_dump(tree))
        cluster.check_out(self.head, "checkout")
        cluster_env = outside.machines["laptop"].folder / "root/olora_ray/deploy/cluster.env"
        (self.head.folder / "root/checkout/deploy/cluster.env").write_text(cluster_env.read_text())

    def night(self, options: str = "", more: str = "", **variables: str) -> tuple[int, str]:
        """One night: (exit code, what cron would mail)."""
        lines = (self.head.folder / "root/checkout/deploy/crontab").read_text().splitlines()
        settings = dict(line.split("=", 1) for line in lines if re.match("[A-Z_]+=", line))
        settings |= {
            "PROJECT": "/root/checkout",
            "BIN": "/root/olora_env/bin",
            "LOG": "/root/retrain.log",
        }
        settings |= {"CONFIG": str(self.played.config), "PATH": "/usr/bin:/bin", **variables}
        command = lines[-1].split(maxsplit=5)[5]
        command = command.replace(
            "deploy/night.py", f"deploy/night.py --pause 2 --tries 2 {options}"
        )
        command = command.replace(
            "pipelines/retrain.py $CONFIG", f"pipelines/retrain.py $CONFIG {more}"
        )
        done = self.head.run(command, **settings)
        return done.returncode, done.stdout

    def aliases(self) -> dict[str, str]:
        words = f"cd checkout && . <(sed 's/^/export /' deploy/cluster.env | grep -v '#') && python -c {SHOW_ALIASES!r}"
        found: dict[str, str] = json.loads(self.head.ok(words).splitlines()[-1])
        return found

    def last(self) -> dict[str, Any]:
        """The last notification."""
        return self.outside.heard[-1]


SHOW_ALIASES = (
    "import json, os; from olora_ray.tracking.aliases import Aliases;"
    f' print(json.dumps(Aliases(os.environ["MLFLOW_TRACKING_URI"], "{scenario.NAME}").current()))'
)


@pytest.fixture(scope="module")
def nights(outside: World) -> Nights:
    (outside.shared / "nights").mkdir()
    return Nights(outside)


def test_four_nights_and_a_rollback(nights: Nights) -> None:
    played, heard = nights.played, nights.outside.heard
    played.arrive("night-1", played.first)
    assert nights.night() == (0, "")
    assert nights.aliases() == {"champion": "1"}
    assert (nights.last()["event"], nights.last()["version"]) == ("promoted", "1")

    told = len(heard)
    assert nights.night() == (0, "")  # nothing changed
    assert (nights.aliases(), len(heard)) == ({"champion": "1"}, told)

    played.arrive("night-3", played.more)
    assert nights.night() == (0, "")
    assert nights.aliases() == {"champion": "2", "previous": "1"}
    assert nights.last()["event"] == "promoted"

    played.arrive("night-3", played.poison)
    assert nights.night() == (0, "")
    assert nights.aliases() == {"champion": "2", "previous": "1", "challenger": "3"}
    assert (nights.last()["event"], nights.last()["version"]) == ("refused", "3")

    said = nights.head.ok(
        "cd checkout && set -a && . deploy/cluster.env && python pipelines/registry.py rollback support"
    )
    assert "version 1 is the champion again" in said
    assert nights.aliases() == {"champion": "1", "challenger": "3"}


def test_without_its_alias_the_champion_is_compared_with_all_the_same(nights: Nights) -> None:
    forget = SHOW_ALIASES.replace(
        "print(",
        f'a = Aliases(os.environ["MLFLOW_TRACKING_URI"], "{scenario.NAME}");'
        f' a.client.delete_registered_model_alias("{scenario.NAME}", "champion"); print(',
    )
    nights.head.ok(f"cd checkout && set -a && . deploy/cluster.env && python -c {forget!r}")
    # Instead of the first rows: with these beside them, a model that has seen the third word may rightly win.
    nights.played.arrive("night-1", nights.played.poison)
    code, _ = nights.night()
    assert code == 0
    assert nights.last()["event"] == "refused"
    assert "the champion's" in nights.last()["reason"]
    assert "champion" not in nights.aliases()


def test_bad_nights_are_told(nights: Nights) -> None:
    """Exit code, notification and the line in cron's mail of each."""
    outside, played = nights.outside, nights.played
    nights.played.arrive("night-6", nights.played.more[:20])

    outside.stop_server("nginx")  # MLflow does not answer
    code, mail = nights.night()
    assert (code, nights.last()["event"]) == (75, "not finished")
    assert "no MLflow server answers" in mail
    outside.nginx()

    credentials = nights.head.folder / "root/.mlflow/credentials"
    right = credentials.read_text()
    credentials.write_text(right.replace(outside.password, "wrong"))
    code, mail = nights.night()
    assert (code, nights.last()["event"]) == (2, "failed")
    assert "refuses access" in nights.last()["reason"] + mail
    credentials.write_text(right)

    code, mail = nights.night(more=f"run.storage={outside.full_disk}")
    assert (code, nights.last()["event"]) == (2, "failed")
    assert "No space left on device" in nights.last()["reason"]

    whole = (played.data / "night-6.jsonl").read_bytes()
    (played.data / "night-6.jsonl").write_bytes(whole[:-20])  # it is still being copied
    code, mail = nights.night()
    assert (code, nights.last()["event"]) == (2, "failed")
    assert "night-6.jsonl:20" in nights.last()["reason"]
    (played.data / "night-6.jsonl").write_bytes(whole)

    silent = (
        'import socket, time; server = socket.create_server(("127.0.0.1", 9999)); time.sleep(999)'
    )
    nights.head.start(
        f"python -c {shlex.quote(silent)}", "silent.log"
    )  # it accepts and never answers
    code, mail = nights.night("--hours 0.01 --grace 5", RAY_ADDRESS="http://127.0.0.1:9999")
    assert (code, nights.last()["event"]) == (75, "not finished")
    assert "the limit of a night" in nights.last()["reason"]

    assert outside.password not in json.dumps(outside.heard) + mail


def test_prometheus_has_each_series_of_the_dashboard(
    outside: World, head: Machine, config: Path
) -> None:
    prometheus = head.run("which prometheus").stdout.strip()
    if not prometheus:
        pytest.skip("no Prometheus")
    nodes = "scrape_configs:\n- job_name: ray\n  scrape_interval: 2s\n  file_sd_configs:\n"
    nodes += "  - files: [/tmp/ray/prom_metrics_service_discovery.json]\n    refresh_interval: 5s\n"
    (head.folder / "root/prometheus.yml").write_text(nodes)
    head.start(
        f"{prometheus} --config.file=prometheus.yml --storage.tsdb.path=/tmp/tsdb --web.listen-address=0.0.0.0:9090",
        "prometheus.log",
    )
    dashboard = json.loads((ROOT / "deploy/grafana/olora_ray.json").read_text())
    queries = [
        target["expr"].replace("$run", ".*")
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    began = int(time.time())
    submitted(outside.machines["laptop"], "pipelines/finetune.py", str(config), "run.name=seen")
    for query in (
        queries
    ):  # as Grafana asks: over a time, since a gauge ends with the process that has set it
        words = f"curl -sG http://head:9090/api/v1/query_range -d step=5 -d start={began} -d end={int(time.time())}"
        words += f" --data-urlencode 'query={query.replace('$__rate_interval', '1m')}'"
        found = json.loads(outside.machines["laptop"].ok(words))
        assert found["data"]["result"], query
