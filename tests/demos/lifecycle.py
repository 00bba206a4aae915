"""Five nights of a registered model, with real parts only: Ray with tokens, MLflow with passwords, jobs, a browser.

    python -m tests.demos.lifecycle [--quick] [--picture FILE.png]

    1  the first training                  version 1 is the champion
    2  the same again                      nothing changed
    3  new data                            version 2 passes the gate and is the champion
    4  poisoned data                       version 3 is refused
    5  rollback                            version 1 is the champion again

After each night the registry's state is checked through MLflow's client. --quick plays it with a tiny random model.
"""

import argparse
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.checksums import GATE
from tests import browser
from tests.demos import page, scenario
from tests.demos.scenario import NAME, Scenario
from tests.mlflow_server import Server
from tests.ray_head import ROOT, Head
from tests.recovery.processes import scratch

USER = "nightly"
LINEAGE = ("base", "base_digest", "code", "cpu_seconds", "data_digest", "gate", "submitted_by")


class Mistake(AssertionError):
    """The registry is not as it should be."""


@dataclass(frozen=True)
class Registry:
    """What is to be found in MLflow after a night."""

    aliases: Mapping[str, str]
    decisions: Sequence[str]
    """Of all nights so far, the oldest first."""
    reason: str
    """Beginning of the last decision's reason."""
    tags: Mapping[str, str]
    """Version -> beginning of what the gate's tag on it says."""


class Demo:
    """A head, a server and a scenario, and what is done with them."""

    def __init__(self, head: Head, server: Server, password: str, played: Scenario) -> None:
        self.head, self.server, self.password, self.played = head, server, password, played
        self.client, self.aliases = MlflowClient(server.uri), Aliases(server.uri, NAME)

    def retrain(self) -> str:
        """One night, as a scheduler calls it; returns what was printed."""
        began = time.monotonic()
        code, log = self.head.submit("pipelines/retrain.py", self.played.config, show=_indented)
        if code != 0:
            raise Mistake(f"the job ended with exit code {code}:\n{log}")
        if self.password in log:
            raise Mistake("the job's log has MLflow's password")
        _without_bars(log)
        print(f"   exit code 0 after {time.monotonic() - began:.0f} s")
        return log

    def registry(self, *words: str) -> str:
        """`pipelines/registry.py WORDS`; it has the password from its environment."""
        command = [sys.executable, "pipelines/registry.py", *words]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Mistake(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        _without_bars(done.stderr)
        return done.stdout

    def check(self, wanted: Registry) -> None:
        """Compare MLflow with what is wanted, and print one line on it."""
        decisions = self.decisions()
        last = decisions[-1].data.tags
        gates = {number: self.aliases.version(number).tags.get(GATE, "") for number in wanted.tags}
        _same("aliases", self.aliases.current(), dict(wanted.aliases))
        _same("decisions", [run.data.tags["olora.decision"] for run in decisions], list(wanted.decisions))
        _begins("reason of the decision", last["olora.reason"], wanted.reason)
        for number, text in wanted.tags.items():
            _begins(f"the gate's tag of version {number}", gates[number], text)
        print(f"   registry: {', '.join(f'{alias} = {number}' for alias, number in sorted(wanted.aliases.items()))}")
        for number, text in gates.items():
            print(f"   version {number}: {text}")

    def decisions(self) -> list[Run]:
        """The runs in MLflow that tell of decisions, the oldest first."""
        experiment = self.client.get_experiment_by_name("olora")
        assert experiment is not None
        order = ["attributes.start_time ASC"]
        return list(
            self.client.search_runs([experiment.experiment_id], "tags.`olora.kind` = 'retraining'", order_by=order)
        )

    def check_jobs(self) -> None:
        """What Ray tells of its jobs has no password."""
        told = self.head.jobs()
        if self.password in told or str(self.played.config) not in told:
            raise Mistake("Ray's list of jobs has MLflow's password, or not the jobs")


def play(demo: Demo, picture: Path | None) -> None:
    """The five nights. Raises Mistake at the first thing that is not as it should be."""
    played = demo.played
    _title(f"1 first training: {len(played.first)} rows")
    played.arrive("night-1", played.first)
    demo.retrain()
    demo.check(Registry({"champion": "1"}, ["promoted"], "eval/loss", {"1": "passed: eval/loss"}))

    _title("2 the same again")
    log = demo.retrain()
    if f"nothing changed since version 1 of {NAME}" not in log or "ray:" in log:
        raise Mistake(f"it should have said that nothing changed, and not have connected to Ray:\n{log}")
    demo.check(Registry({"champion": "1"}, ["promoted", "unchanged"], "nothing changed", {}))

    _title(f"3 new data: {len(played.more)} rows more")
    played.arrive("night-3", played.more)
    demo.retrain()
    told = ["promoted", "unchanged", "promoted"]
    demo.check(Registry({"champion": "2", "previous": "1"}, told, "eval/loss", {"2": "passed: eval/loss"}))

    _title(f"4 poisoned data: instead of these, {len(played.poison)} rows with each other's answers")
    played.arrive("night-3", played.poison)
    demo.retrain()
    told = [*told, "refused"]
    aliases = {"champion": "2", "previous": "1", "challenger": "3"}
    demo.check(Registry(aliases, told, "eval/loss", {"3": "refused: eval/loss"}))
    if picture:
        page.show(demo.server.uri, (USER, demo.password), NAME, aliases, picture)
        print(f"   MLflow's page of the model: {picture}")

    _title("5 rollback")
    print(f"   {demo.registry('rollback', NAME).rstrip()}")
    demo.check(Registry({"champion": "1", "challenger": "3"}, told, "eval/loss", {"2": "rolled back: by hand"}))
    print(demo.registry("list", NAME))
    shown = demo.registry("show", NAME, "1")
    print(shown)
    if missing := [what for what in LINEAGE if f"olora.{what} = " not in shown]:
        raise Mistake(f"version 1, which a job has made, does not tell {', '.join(missing)}")
    demo.check_jobs()


def run(make: Callable[[Path], Scenario], picture: Path | None) -> None:
    """Start everything in a folder of its own, play, and leave nothing behind."""
    with scratch() as folder:
        password = secrets.token_urlsafe(24)
        print("starting an MLflow server with authentication, and a Ray head with token authentication", flush=True)
        server = Server(folder, (USER, password))
        mlflow = {
            "MLFLOW_TRACKING_URI": server.uri,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": password,
        }
        head = Head(folder, mlflow)
        head.start()
        played = make(folder)
        server.wait()
        with _set(mlflow):  # for MLflow's client, and for the command line of the registry
            play(Demo(head, server, password, played), picture)


@contextlib.contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(argv: Sequence[str]) -> None:
    """Read the arguments and run; a signal ends it like Ctrl+C, after everything is cleaned up."""
    parser = argparse.ArgumentParser(prog="python -m tests.demos.lifecycle", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="with a tiny random model instead of SmolLM2")
    parser.add_argument(
        "--picture", type=Path, help="where the screenshot of MLflow's page goes; none is taken without"
    )
    arguments = parser.parse_args(argv)
    if arguments.picture and browser.program() is None:
        print("there is no Chromium: no picture is taken")
        arguments.picture = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    run(scenario.quick if arguments.quick else scenario.real, arguments.picture)
    print(f"all is as it should be, after {time.monotonic() - began:.0f} s")


def _title(text: str) -> None:
    print(f"\n{text}", flush=True)


def _indented(line: str) -> None:
    if line[2:3] == ":" or line.startswith("error"):  # the job's own lines; the rest is Ray's
        print(f"   | {line}", flush=True)


def _without_bars(log: str) -> None:
    if "Downloading artifacts" in log:
        raise Mistake(f"MLflow's progress bars are in the log:\n{log}")


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Mistake(f"{what}: expected {wanted}, found {found}")


def _begins(what: str, found: str, wanted: str) -> None:
    if not found.startswith(wanted):
        raise Mistake(f"{what}: expected '{wanted}...', found '{found}'")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Mistake as mistake:
        sys.exit(f"FAILED: {mistake}")
    except KeyboardInterrupt:
        sys.exit(130)
