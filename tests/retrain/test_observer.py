"""A service on another machine hears of each night that fails, and of one that never began; quiet nights are quiet."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from olora_ray.config.load import load_config
from olora_ray.retrain import decision_run, recipe
from olora_ray.retrain.decision_run import GOOD, METRICS, Entry
from olora_ray.retrain.recipe import AGAINST
from olora_ray.tracking.checksums import GATE
from pipelines import nights
from tests import mlflow_database, registered, tiny
from tests.receiver import Receiver, receiver
from tests.retrain.nightly import Nightly

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
HOUR = 3600.0


@dataclass
class Watched:
    """A project whose nights are watched, and the service that hears of them."""

    project: Nightly
    hook: Receiver

    def night(self, *command: str) -> int:
        """Run one night through night.py; return the exit code."""
        spec = importlib.util.spec_from_file_location("night", ROOT / "deploy" / "night.py")
        assert spec
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            script.main(["--pause", "0", "--tries", "1", str(self.project.config), "--", *command])
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        raise AssertionError("a night ends with an exit code")

    def heard(self) -> list[str]:
        """The ends of the addresses to which the pings went: of a start, a failure, or a good end."""
        return [path.rpartition("/")[2] for path, _ in self.hook.pings]


@pytest.fixture
def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.chdir(ROOT)
    with receiver() as hook:
        (folder / "ping").write_text(hook.url.replace("/hook/s3cr3tOfTheHook", "/ping"))
        yield Watched(
            Nightly(folder, folder / "model", retrain={"ping": f"file:{folder}/ping"}), hook
        )


TELL = "echo '{}' >&${{OLORA_OUTCOME%:*}}; echo a row; exit {}"


def busy(hours: float) -> str:
    facts = {"busy_since": time.time() - hours * HOUR, "reason": "already running"}
    return TELL.format(json.dumps(facts), 75)


ENDS = {
    "good, and heard with its decision": (
        TELL.format('{"reason": "version 2 is the champion", "sent": "promoted"}', 0),
        "ping",
        "version 2 is the champion (exit code 0)",
    ),
    "another one works on it": (busy(4), "ping", "already running"),
    "another one hangs with the lock": (
        busy(21),
        "fail",
        "already running",
    ),
    "the node is drained": ("kill -TERM $PPID; sleep 5", "fail", "stopped by SIGTERM"),
    "Ray's head is off": (
        f"{sys.executable} deploy/submit.py x -- true",
        "fail",
        "Ray's dashboard does not answer",
    ),
}


@pytest.mark.parametrize(("command", "heard", "why"), ENDS.values(), ids=ENDS)
def test_a_night_is_heard_at_its_begin_and_at_its_end_with_the_cause(
    watched: Watched, command: str, heard: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    code = watched.night("bash", "-c", command)
    assert (code == 0) == (heard == "ping")
    assert watched.heard() == ["start", heard]
    assert why in watched.hook.pings[-1][1]


def test_a_night_whose_machine_is_lost_is_heard_at_its_begin_alone(watched: Watched) -> None:
    words = [sys.executable, "deploy/night.py", str(watched.project.config)]
    done = subprocess.run([*words, "--", "bash", "-c", "kill -9 $PPID"], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert watched.heard() == ["start"]


def test_a_ping_that_fails_changes_nothing(watched: Watched) -> None:
    (watched.project.folder / "ping").write_text("http://127.0.0.1:9/ping")
    assert watched.night("true") == 0


def test_a_quiet_night_is_recorded_and_measured(
    watched: Watched, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (watched.project.folder / "model").symlink_to(model)
    project, metrics = watched.project, watched.project.folder / "nights.prom"
    client = project.aliases.client
    client.create_registered_model("nightly")
    now = recipe.read_inputs(load_config(project.config)).fingerprint
    client.create_model_version(
        "nightly", "/nowhere", tags={**now.tags(), GATE: "passed: eval/loss 0.5", AGAINST: ""}
    )
    client.set_registered_model_alias("nightly", "champion", "1")
    words = [sys.executable, "-m", "olora_ray", "retrain", str(project.config)]
    assert watched.night(*words, f"retrain.metrics={metrics}") == 0
    assert watched.heard()[-1] == "ping"
    assert float(client.get_registered_model("nightly").tags[GOOD]) == pytest.approx(
        time.time(), abs=60
    )
    assert samples(metrics.read_text()).keys() == METRICS.keys()
    nights.main(["nightly", "--within", "1", "--tracking-uri", project.aliases.uri])
    assert "promoted version 1: eval/loss 0.5" in capsys.readouterr().out


def samples(text: str) -> dict[str, float]:
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert {sample.labels["model"] for sample in found} <= {"nightly", "support"}
    return {sample.name: sample.value for sample in found}


def test_mlflow_alone_tells_champion_refusals_and_age(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aliases = registered.model(mlflow_database.place(tmp_path / "runs"), "support", 3)
    where = {"run__storage": str(tmp_path / "runs"), "registry__model": "support"}
    with receiver() as gateway:
        config = tiny.config(**where, retrain__metrics=gateway.url.partition("/hook")[0])
        rows = {"olora.held_out_digest": "abc"}
        aliases.promote("1", "passed: eval/loss 0.5", {AGAINST: "", **rows})
        for number in ("2", "3"):
            aliases.refuse(number, f"refused: eval/loss 0.{number}", {AGAINST: "1", **rows})
            decision_run.of_version(config, aliases.version(number))
        decision_run.write_decision(config, Entry("failed", "the disk is full"))
        decision_run.good_night(config, aliases)
        ((path, body),) = gateway.pings
    assert path == "/metrics/job/olora_ray/model/support"
    told = samples(body)
    assert told["olora_held_out_uses"] == 3
    assert all(
        value == pytest.approx(time.time(), abs=120)
        for name, value in told.items()
        if "seconds" in name
    )
    words = ["support", "--tracking-uri", aliases.uri]
    nights.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert "0.0 hours ago" in lines[0]
    assert lines[1].endswith(": passed: eval/loss 0.5")
    assert "version 1 since 20" in lines[1]
    assert lines[4].endswith(" 9 bytes in MLflow, which has 3 versions")
    assert lines[5].startswith("held-out rows:   3 versions decided on them")
    assert [line.partition(" ")[2].partition(" ")[2] for line in lines[6:]] == [
        "failed: the disk is full",
        "refused version 3: eval/loss 0.3",
        "refused version 2: eval/loss 0.2",
    ]
    aliases.client.set_registered_model_tag("support", GOOD, f"{time.time() - 27 * HOUR:.0f}")
    nights.main([*words, "--within", "28"])
    with pytest.raises(SystemExit) as end:
        nights.main([*words, "--within", "26"])
    assert end.value.code == 1


@pytest.fixture
def promtool() -> str:
    if found := shutil.which("promtool"):
        return found
    pytest.skip("promtool, Prometheus's own checker, is not installed")


def test_prometheus_fires_for_a_missing_night_and_not_before(promtool: str, tmp_path: Path) -> None:
    good = 'olora_night_last_success_timestamp_seconds{model="support"}'
    head_lost = {"series": good, "values": "0+0x20 _x1600"}  # the series ends after five hours
    quiet = {"series": good, "values": "0x95 86400x95 172800x95 259200x95 345600x95"}
    silence = {"series": "up", "values": "1x1000"}

    def firing(alert: str, at: str, number: int) -> dict[str, Any]:
        expr = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
        return {"expr": expr, "eval_time": at, "exp_samples": [{"labels": "{}", "value": number}]}

    cases = [
        (head_lost, [firing("NoGoodNight", "25h", 0), firing("NoGoodNight", "26h15m", 1)]),
        (quiet, [firing("NoGoodNight", f"{hours}h", 0) for hours in range(0, 120, 8)]),
        (silence, [firing("NightsUnknown", "10m", 0), firing("NightsUnknown", "20m", 1)]),
    ]
    tests = [
        {"interval": "15m", "input_series": [series], "promql_expr_test": asked}
        for series, asked in cases
    ]
    tree = {"rule_files": [str(RULES)], "evaluation_interval": "5m", "tests": tests}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(tree))
    subprocess.run([promtool, "test", "rules", str(tmp_path / "test.yaml")], check=True)
