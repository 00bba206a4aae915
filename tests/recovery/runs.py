"""One run of finetune.py that is interrupted and started again, and what must hold of it in the end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olora_ray.common import storage
from tests.pipelines import project
from tests.recovery import moments, processes

FAULTS = Path(__file__).parent / "faults"
NAME = "small"
STEPS, CHECKPOINT_EVERY, EVAL_EVERY = 8, 3, 4
ATTEMPT_SECONDS = 400.0
ABOUT_MACHINES = {
    f"train/{name}_seconds" for name in ("exchange", "fastest_worker", "slowest_worker")
}
"""Metrics of which a checkpoint has no history: a driver that is killed may not have logged the last ones."""
REPEATABLE = {"train/loss", "train/lr", "train/grad_norm", "eval/loss", "eval/perplexity"}
REPEATABLE |= {
    f"{split}/{name}"
    for split in ("train", "eval")
    for name in ("objective", "pairs/loss", "pairs/margin", "pairs/chosen", "pairs/rejected")
}
"""Metrics whose values are the same in every run; others are times."""

RESUMED = re.compile(
    r"^\S+ (.*\S) *training continues after step (\d+) of (?:\d+|\?) with (\d+) workers?; (\d+) steps? done again"
)
INITIALISED = "initialisation: worker 0: "


def written(tiny_project: Path, folder: Path, **changes: Any) -> Path:
    """The config of a run as a file in `folder`, where its storage lies too; the model and the corpus are elsewhere."""
    short: dict[str, Any] = {
        "run__storage": str(folder / "runs"),
        "train__steps": STEPS,
        "train__checkpoint_every": CHECKPOINT_EVERY,
        "train__eval_every": EVAL_EVERY,
        "train__log_every": 1,
        "evaluation__scorer": None,
        "evaluation__samples": 0,
    }
    return project.write_config(
        folder, project.settings(tiny_project, tiny_project / "model", **short | changes)
    )


@dataclass(frozen=True)
class Fault:
    """What happens where; see faults/olora_fault_points.py."""

    phase: str = "none"
    kind: str = "hold"
    step: int | None = None
    rank: int | None = None
    pace: float = 0.0
    """Seconds that every step takes longer."""

    def text(self, folder: Path) -> str:
        parts = {**vars(self), "dir": folder}
        return ";".join(f"{name}={value}" for name, value in parts.items() if value is not None)


def environment(folder: Path, fault: Fault) -> dict[str, str]:
    """Variables for the driver, which Ray's processes inherit; `folder` marks them and takes their temporary files."""
    (folder / "t").mkdir(exist_ok=True)
    own = {
        **fault_points(folder, fault),
        "TMPDIR": str(folder / "t"),
        "RAY_TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    others = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    }
    return others | own


def fault_points(folder: Path, fault: Fault) -> dict[str, str]:
    """Variables with which a process has the fault points and the small shards of these tests."""
    path = os.pathsep.join([str(FAULTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "OLORA_FAULT": fault.text(folder)}


@dataclass
class Run:
    """The attempts of one run: the same command, as often as it is given."""

    config: Path
    folder: Path
    """Marks its processes, and keeps their output until it is removed."""
    fault: Fault = field(default_factory=Fault)
    prefix: tuple[str, ...] = ()
    """Words before the command, e.g. to enter a network namespace."""
    extra: dict[str, str] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    """Words section.field=value after the config."""
    cwd: Path = project.ROOT
    """Where the command is given."""
    driver: "subprocess.Popen[bytes] | None" = None
    attempts: int = 0

    def start(self) -> None:
        """Give the command."""
        self.attempts += 1
        command = [
            *self.prefix,
            sys.executable,
            str(project.ROOT / "pipelines" / "finetune.py"),
            str(self.config),
        ]
        command += self.changes
        with self._file("out").open("wb") as out, self._file("err").open("wb") as err:
            self.driver = subprocess.Popen(
                command,
                env=environment(self.folder, self.fault) | self.extra,
                stdout=out,
                stderr=err,
                cwd=self.cwd,
                start_new_session=True,
            )

    def wait(self, seconds: float = ATTEMPT_SECONDS) -> int:
        """The command's exit code; negative after a signal."""
        try:
            return self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"attempt {self.attempts} does not end\n{self.tail()}") from None

    def attempt(self, seconds: float = ATTEMPT_SECONDS) -> int:
        """Give the command and wait for its end."""
        self.start()
        return self.wait(seconds)

    def wait_for_fault(self, seconds: float = ATTEMPT_SECONDS) -> dict[str, Any]:
        """Who reached the chosen point, once somebody has."""
        marker = self.folder / "marker"
        self.wait_until(marker.exists, f"{self.fault} is never reached", seconds)
        return dict(json.loads(marker.read_text()))

    def wait_until(self, condition: Any, what: str, seconds: float = ATTEMPT_SECONDS) -> None:
        """Poll while the driver lives."""
        end = time.monotonic() + seconds
        while not condition():
            ended = self.driver.poll()
            assert ended is None or condition(), (
                f"{what}: the driver has ended with {ended}\n{self.tail()}"
            )
            assert time.monotonic() < end, f"{what}\n{self.tail()}"
            time.sleep(0.05)

    def release(self) -> None:
        """Let the process continue that stands still."""
        (self.folder / "release").touch()

    def terminate_driver(self) -> None:
        self.driver.send_signal(signal.SIGTERM)

    def kill_controller(self) -> None:
        found = processes.controllers(self.folder)
        assert found, "no process is the Train controller"
        for process in found:
            process.kill()

    def kill_everything(self) -> None:
        """SIGKILL for driver, Ray and workers at once, as when a machine stops; its temporary files stay."""
        processes.kill_all(self.folder)

    def lines(self) -> list[str]:
        """All that the attempts have printed so far to stdout."""
        files = (self._file("out", number) for number in range(1, self.attempts + 1))
        return [line for file in files for line in file.read_text(errors="replace").splitlines()]

    def resumptions(self) -> list["Resumption"]:
        """Each time training was resumed, from the log."""
        found = (RESUMED.search(line) for line in self.lines())
        return [Resumption(m[1], int(m[2]), int(m[3]), int(m[4])) for m in found if m]

    def told_initialised(self) -> int:
        """How often the log says that the adapter was initialised."""
        return sum(INITIALISED in line for line in self.lines())

    def initialised(self) -> int:
        """How often it was."""
        return self._done().count("initialisation")

    def again(self) -> int:
        """How many steps were done again; the log may know of fewer, if the driver died with the workers."""
        steps = [line for line in self._done() if line.startswith("step")]
        return len(steps) - len(set(steps))

    def last_step(self) -> int:
        """The step that was done last, up to now."""
        return int(self._done()[-1].split()[-1])

    def tail(self, count: int = 40) -> str:
        """The end of all output, for a failed test."""
        files = sorted(self.folder.glob("attempt-*"))
        shown = [
            "\n".join(file.read_text(errors="replace").splitlines()[-count:]) for file in files
        ]
        missing = self.folder / "missing"
        absent = f"\nnot in the product: {missing.read_text()}" if missing.exists() else ""
        return (
            "\n".join(f"--- {file.name}\n{text}" for file, text in zip(files, shown, strict=True))
            + absent
        )

    def last_words(self) -> str:
        """The last line of the newest attempt, of its errors if there are any."""
        texts = [self._file(kind).read_text(errors="replace").strip() for kind in ("err", "out")]
        return next((text.splitlines()[-1] for text in texts if text), "nothing was printed")

    def _done(self) -> list[str]:
        return [one.what for one in moments.read(self.folder)]

    def _file(self, kind: str, number: int | None = None) -> Path:
        return self.folder / f"attempt-{number or self.attempts}.{kind}"


def run_clean(
    tiny_project: Path, folder: Path, seconds: float = ATTEMPT_SECONDS, **changes: Any
) -> "EndState":
    """What a run leaves in peace, within so many seconds, that is interrupted elsewhere."""
    with processes.scratch() as scratch:
        run = Run(written(tiny_project, folder, **changes), scratch)
        assert run.attempt(seconds) == 0, run.tail()
        assert not (scratch / "missing").exists(), run.tail()
        assert (run.initialised(), run.told_initialised(), run.resumptions()) == (1, 1, []), (
            run.tail()
        )
    return end_state(folder)


@dataclass(frozen=True)
class Resumption:
    """A line of the log that says how training continues."""

    why: str
    step: int
    workers: int
    again: int


@dataclass(frozen=True)
class EndState:
    """What a run has left."""

    adapter: bytes
    others: dict[str, bytes]
    """Moments, and the losses before the first step of a run with pairs."""
    statuses: tuple[str, ...]
    """Of all MLflow runs there are."""
    series: dict[str, tuple[tuple[int, float], ...]]
    """Metric -> (step, value), in order of steps, of the first MLflow run."""
    versions: tuple[int, ...]
    """Registered versions of the model."""
    result: dict[str, Any]


def end_state(place: Path) -> EndState:
    """What the run has left whose config lies in this folder."""
    from mlflow import MlflowClient

    root = place / "runs"
    folder = root / NAME
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    logged = runs[0].data.metrics if runs else {}
    names = [
        name for name in logged if not name.startswith("system/") and name not in ABOUT_MACHINES
    ]
    return EndState(
        adapter=(folder / "export" / "adapter" / "adapter_model.safetensors").read_bytes(),
        others=others(str(root)),
        statuses=tuple(run.info.status for run in runs),
        series={
            name: _series(client.get_metric_history(runs[0].info.run_id, name)) for name in names
        },
        versions=tuple(int(one.version) for one in client.search_model_versions(f"name='{NAME}'")),
        result=json.loads((folder / "result.json").read_text()),
    )


def others(folder: str) -> dict[str, bytes]:
    """Moments and reference files in a storage, by file name."""
    files = storage.files_below(folder)
    last = max(
        file for file in files if file.startswith(NAME) and file.endswith("/optimizer.safetensors")
    )
    wanted = [last, *(file for file in files if "/reference-" in file)]
    return {file.rpartition("/")[2]: storage.read_bytes(f"{folder}/{file}") for file in wanted}


def _series(history: Iterable[Any]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted((point.step, point.value) for point in history))


def differences(found: EndState, wanted: EndState) -> list[str]:
    """Every way in which an interrupted run's end differs from that of a run nobody touched, but for times."""
    problems = []
    if found.adapter != wanted.adapter:
        problems.append("the adapter has other bytes")
    if found.others != wanted.others:
        problems.append(f"{[*found.others]} have other bytes than {[*wanted.others]}")
    if found.statuses != ("FINISHED",):
        problems.append(f"MLflow runs: {found.statuses}")
    if found.versions != (1,):
        problems.append(f"registered versions: {found.versions}")
    for name in sorted(found.series.keys() | wanted.series.keys()):
        have, want = (side.series.get(name, ()) for side in (found, wanted))
        if name not in REPEATABLE:
            have, want = ([step for step, _ in points] for points in (have, want))
        if have != want:
            problems.append(f"{name}: {have}, not {want}")
    for name in ("steps", "registered"):
        if found.result.get(name) != wanted.result.get(name):
            problems.append(f"result.json: {name}: {found.result.get(name)}")
    have, want = (side.result.get("metrics", {}) for side in (found, wanted))
    return problems + [
        f"result.json: {name} is {have.get(name)}"
        for name in REPEATABLE & want.keys()
        if have.get(name) != want[name]
    ]
