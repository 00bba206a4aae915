"""A service on another machine hears of each night that fails, and of one that never began; quiet nights are quiet."""

import contextlib
import importlib.util
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from tests.deploy.test_grafana import queries
from tests.receiver import Receiver, receiver
from tests.retrain.nightly import Nightly

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
HOUR, DAY = 3600.0, 86400.0


@dataclass
class DeadMan:
    """The rules of healthchecks.io on a simulated clock: a call each day, and an alarm when it is missing or bad."""

    period: float = DAY
    grace: float = 21 * HOUR
    """A night takes up to 20 hours."""
    good: float = 0.0
    started: float | None = None
    failed: str = ""
    told: str = ""
    """Text of the last call."""
    at: float = 0.0

    def hear(self, path: str, text: str) -> None:
        self.told = text
        if path.endswith("/start"):
            self.started = self.at
        elif path.endswith("/fail"):
            self.failed, self.started = text, None
        else:
            self.good, self.failed, self.started = self.at, "", None

    def alarm(self) -> str:
        """Return the reason for the alarm; empty if there is none."""
        if self.started is not None and self.at > self.started + self.grace:
            return self.failed or "a night began and did not end"
        if self.at > self.good + self.period + self.grace:
            return self.failed or "no signal"
        return self.failed


@dataclass
class Watched:
    """A project whose nights are watched, and the service that watches them."""

    project: Nightly
    hook: Receiver
    service: DeadMan = field(default_factory=DeadMan)

    def night(self, *command: str, options: tuple[str, ...] = ()) -> int:
        """Run one night through night.py; the service hears its pings. Return the exit code."""
        spec = importlib.util.spec_from_file_location("night", ROOT / "deploy" / "night.py")
        assert spec
        assert spec.loader
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            script.main(
                ["--pause", "0", "--tries", "1", *options, str(self.project.config), "--", *command]
            )
        except SystemExit as end:
            code = int(end.code or 0)
        except ValueError:
            code = 2
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.heard()
        return code

    def heard(self) -> None:
        for ping in self.hook.pings:
            self.service.hear(*ping)
        self.hook.pings.clear()

    def retrain(self, *changes: str) -> list[str]:
        return [sys.executable, "-m", "olora_ray", "retrain", str(self.project.config), *changes]


@pytest.fixture
def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(ROOT)
    with receiver() as hook:
        (folder / "ping").write_text(hook.url.replace("/hook/", "/ping/"))
        yield Watched(
            Nightly(folder, folder / "model", retrain={"ping": f"file:{folder}/ping"}), hook
        )


def run(code: str) -> list[str]:
    """Return a command that runs `code` as an entry script does."""
    whole = f"import os\nfrom olora_ray.config import command_line\ndef main(argv):\n    {code}\ncommand_line.run(main)"
    return [sys.executable, "-c", whole]


def test_a_good_night_is_heard_with_its_decision(watched: Watched) -> None:
    """Regression: it was heard with the line that the webhook had got it."""
    assert (
        watched.night(
            "bash", "-c", "echo version 2 is the champion; echo \"the event 'promoted' was sent\""
        )
        == 0
    )
    assert watched.service.told == "version 2 is the champion (exit code 0)"


SINCE = "error: the retraining of nightly is already running (process 7 on a, since {}); try again later"
LONG_AGO = SINCE.format("2026-01-02 02:30:00")
FAILURES: dict[str, tuple[list[str], str]] = {
    "the checkout is gone": ([sys.executable, "/gone/retrain.py"], "No such file or directory"),
    "a package is gone": (
        [sys.executable, "-c", "import nonexistent"],
        "No module named 'nonexistent'",
    ),
    "the command is gone": (["/none"], "COMMAND /none: No such file"),
    "a bug": (run("1 / 0"), "ZeroDivisionError: division by zero"),
    "the disk is full": (
        run("raise OSError(28, os.strerror(28), '/runs/x')"),
        "/runs/x: No space left on device; make",
    ),
    "Ray's disk is full": (
        run("from ray.exceptions import OutOfDiskError; raise OutOfDiskError('x')"),
        "Ray's temporary folder (ray start --temp-dir): its disk is full; make room",
    ),
    "the error is read before an older line": (
        ["bash", "-c", "echo error: the cause >&2; sleep 0.3; echo an older line; exit 2"],
        "the cause (exit code 2)",
    ),
    "the memory is full": (["bash", "-c", "kill -9 $$"], "killed by SIGKILL"),
    "the job hangs": (["sleep", "60"], "stopped after 0.0003 hours, the limit of a night"),
    "another one hangs with the lock": (
        ["bash", "-c", f"echo '{LONG_AGO}' >&2; exit 75"],
        "since 2026-01-02 02:30:00",
    ),
    "the node is drained": (["bash", "-c", "kill -TERM $PPID; sleep 5"], "stopped by SIGTERM"),
    "Ray's head is off": (
        [sys.executable, "deploy/submit.py", "x", "--", "true"],
        "Ray's dashboard does not answer",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_night_is_heard_at_its_end_with_the_cause(
    watched: Watched, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, cause = FAILURES[failure]
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert watched.night(*command, options=("--hours", "0.0003") if "hangs" in failure else ()) != 0
    assert cause in watched.service.alarm()


def test_what_a_retraining_refuses_is_heard_with_the_cause(watched: Watched, model: Path) -> None:
    (watched.project.folder / "model").symlink_to(model)
    service, project = watched.service, watched.project
    assert watched.night(*watched.retrain("tracking.uri=http://127.0.0.1:9")) == 75
    assert "tracking.uri=http://127.0.0.1:9: no MLflow server answers" in service.alarm()
    with receiver(status=401) as refusing:
        address = refusing.url.partition("/hook")[0]
        assert watched.night(*watched.retrain(f"tracking.uri={address}")) == 2
        assert "the server refuses access" in service.alarm()
    with contextlib.closing(
        sqlite3.connect(project.folder / "runs" / "mlflow.db", isolation_level=None)
    ) as database:
        database.execute("BEGIN IMMEDIATE")
        assert watched.night(*watched.retrain()) == 75
        assert "database is locked" in service.alarm()
    half = project.data / "1-half.jsonl"
    half.write_text((project.data / "0-first.jsonl").read_text()[:-30])
    assert watched.night(*watched.retrain()) == 2
    assert "1-half.jsonl" in service.alarm()
    shutil.rmtree(project.data)
    assert watched.night(*watched.retrain()) == 2
    assert f"{project.data}: " in service.alarm()
    project.config.write_text(project.config.read_text().replace("\nmodel:", "\nmodle:"))
    assert watched.night(*watched.retrain()) == 2
    assert "modle" in service.alarm()


def silent_cron(watched: Watched) -> None:
    """cron, the machine or the cluster is off, or no pod starts: nothing is called."""


def silent_config(watched: Watched) -> None:
    watched.project.config.write_text("- [")
    assert watched.night(*watched.retrain()) == 2


def silent_network(watched: Watched) -> None:
    (watched.project.folder / "ping").write_text("http://127.0.0.1:9/ping")
    assert watched.night("true") == 0  # a ping that fails changes nothing


def silent_head(watched: Watched) -> None:
    """The machine is lost during the night."""
    words = [
        sys.executable,
        "deploy/night.py",
        str(watched.project.config),
        "--",
        "bash",
        "-c",
        "kill -9 $PPID",
    ]
    assert subprocess.run(words, timeout=60, check=False).returncode == -signal.SIGKILL
    watched.heard()
    assert watched.service.started is not None


@pytest.mark.parametrize("silent", [silent_cron, silent_config, silent_network, silent_head])
def test_a_silent_night_is_heard_within_minutes_of_its_deadline(
    watched: Watched, silent: Any
) -> None:
    assert watched.night("true") == 0
    service = watched.service
    service.at = DAY
    silent(watched)
    service.at = DAY + service.grace - 60
    assert service.alarm() == ""
    service.at = DAY + service.grace + 15 * 60
    assert service.alarm() in ("a night began and did not end", "no signal")


def test_thirty_quiet_nights_with_an_overlap_raise_no_alarm(watched: Watched) -> None:
    # The other process has been at work for some hours only.
    line = SINCE.format(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - 4 * HOUR)))
    for day in range(30):
        overlap = ["bash", "-c", f"echo '{line}' >&2; exit 75"]
        watched.service.at = day * DAY
        assert watched.service.alarm() == ""
        assert watched.night(*(overlap if day == 13 else ["true"])) == 0
    assert (watched.service.good, watched.service.alarm()) == (29 * DAY, "")


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
    assert watched.night(*watched.retrain(f"retrain.metrics={metrics}")) == 0
    assert watched.service.alarm() == ""
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
    assert lines[2].startswith("held-out rows:   3 versions decided on them")
    assert [line.partition(" ")[2].partition(" ")[2] for line in lines[3:]] == [
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


def test_prometheus_loads_rules_and_panels(promtool: str, tmp_path: Path) -> None:
    panels = [
        {"record": "x", "expr": query.replace("$run", ".*")}
        for query in queries()
        if "label_values" not in query
    ]
    (tmp_path / "panels.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]})
    )
    for file in (RULES, tmp_path / "panels.yaml"):
        subprocess.run([promtool, "check", "rules", "--lint=none", str(file)], check=True)


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
