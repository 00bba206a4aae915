"""Seconds until a run trains again after an event: the cases that recovery.py measures.

Each case hits one long run repeatedly, each time after the run has settled: all its workers train, and have done some
steps since the last event. The workers record the time of each step (fault points of tests/recovery), because the
driver logs it up to a second later. The log tells to which group a step belongs.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
from common import table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.pipelines import project
from tests.recovery import hosts, moments, processes
from tests.recovery.cluster import Cluster, cluster
from tests.recovery.disturbances import send
from tests.recovery.moments import Done
from tests.recovery.runs import Fault, Run

CONFIG = project.ROOT / "pipelines" / "configs" / "quickstart.yaml"
SETTINGS = (
    "train.steps=100000",
    "train.checkpoint_every=10",
    "train.log_every=1",
    "data.eval=[]",
    "evaluation.scorer=null",
    "registry.model=null",
    "cluster.max_failures=-1",
)
ELASTIC = ("cluster.workers=[1,2]",)
WATCHED = Fault(kind="watch")
SETTLED = 3
"""Steps that all workers do after an event before the run counts as settled."""
PATIENCE = 300.0
"""Timeout of each case in seconds."""
NOTICE = 15
"""Seconds from the drain notice to the end of the host."""
SPARE = 2
"""Index of the host, counted from 1, that is drained and joins."""


@dataclass(frozen=True)
class Sample:
    """The cost of one event."""

    seconds: float
    again: int
    """Repeated steps."""
    gap: float
    """Longest time between two steps until the run has settled."""
    step: float = 0.0
    """Seconds of a step just before the event."""


@dataclass
class Training:
    """A run with so many steps that it does not end during the benchmark."""

    run: Run
    cluster: Cluster | None = None
    seen: int = field(default=0)
    """Number of log lines about changes of the group before the last event."""

    def start(self) -> None:
        self.run.start()
        self.settle()

    def steps(self) -> list[Done]:
        return moments.steps(moments.read(self.run.folder))

    def settle(self, workers: int = 2) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            told, done = len(self.run.resumptions()), len(self.steps())
            self._wait(partial(self._more_than, done + SETTLED), "the run does not settle")
            found = self.run.resumptions()
            if len(found) == told and (found[-1].workers if found else 2) == workers:
                return
        raise AssertionError(f"{workers} workers never train for long\n{self.run.tail()}")

    def mid_step(self) -> float:
        """Wait for the middle of a step and return the time; later log lines belong to the next event."""
        done = self.steps()
        self._wait(partial(self._more_than, len(done)), "no other step is done")
        time.sleep(0.4 * moments.typical(done[-SETTLED:]))
        self.seen = len(self.run.resumptions())
        return time.time()

    def next_step(self, at: float, strangers: Iterable[int] = ()) -> Done:
        """Return the first step after the time `at` that a process outside of `strangers` (pids) has done."""
        gone = frozenset(strangers)
        self._wait(
            lambda: any(one.at > at and one.pid not in gone for one in self.steps()),
            "no step follows",
        )
        return next(one for one in self.steps() if one.at > at and one.pid not in gone)

    def next_group(self, at: float, workers: int) -> Done:
        self._wait(lambda: self._began_after(workers), f"no group of {workers} follows")
        first = self._began_after(workers)[-1] + 1
        self._wait(
            lambda: any(one.at > at and one.step == first for one in self.steps()),
            f"no step {first} follows",
        )
        return next(one for one in self.steps() if one.at > at and one.step == first)

    def sample(self, at: float, seconds: float, workers: int = 2) -> Sample:
        self.settle(workers)
        return summary(self.steps(), at, seconds)

    def _began_after(self, workers: int) -> list[int]:
        return [one.step for one in self.run.resumptions()[self.seen :] if one.workers == workers]

    def _more_than(self, count: int) -> bool:
        return len(self.steps()) > count

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        self.run.wait_until(condition, what, PATIENCE)


def summary(steps: list[Done], at: float, seconds: float) -> Sample:
    _, again = moments.split(steps)
    gaps = [after.at - before.at for before, after in pairwise(steps) if after.at > at]
    step = moments.typical([one for one in steps if one.at <= at][-SETTLED - 1 :])
    return Sample(seconds, sum(one.at > at for one in again), max(gaps, default=0.0), step)


def signal_worker(number: signal.Signals, first: bool, training: Training) -> Sample:
    """Measure from a signal to rank 0, or to another worker, until the next step."""
    speaker = training.steps()[-1].pid
    found = processes.workers(training.run.folder)
    worker = next(one for one in found if (one.pid == speaker) is first)
    at = training.mid_step()
    send(worker, number)
    back = training.next_step(at)
    if number == signal.SIGSTOP:
        send(worker, signal.SIGCONT)
    return training.sample(at, back.at - at)


def terminate_driver(training: Training) -> Sample:
    """Measure from SIGTERM to the end of the driver, minus the rest of the current step; then resume the run."""
    at = training.mid_step()
    training.run.terminate_driver()
    code, end = training.run.wait(PATIENCE), time.time()
    assert code == 143, f"after SIGTERM the command has ended with {code}\n{training.run.tail()}"
    under_way = next((one.at for one in training.steps() if one.at > at), at)
    training.run.start()
    return training.sample(at, end - under_way)


def kill_driver(training: Training) -> Sample:
    """Measure from the start of the same command, after SIGKILL of the driver, to its next step."""
    strangers = [one.pid for one in processes.workers(training.run.folder)]
    at = training.mid_step()
    assert training.run.driver is not None
    training.run.driver.kill()
    training.run.wait(PATIENCE)
    given = time.time()
    training.run.start()
    back = training.next_step(given, strangers)
    return training.sample(at, back.at - given)


def drain_host(training: Training) -> Sample:
    """Measure from the notice that a host is drained to the first step of the others; then kill the host."""
    assert training.cluster is not None
    host = training.cluster.others[SPARE - 1]
    training.mid_step()
    training.cluster.drain(host, NOTICE)
    at = time.time()
    back = training.next_group(at, workers=1)
    found = training.sample(at, back.at - at, workers=1)
    time.sleep(max(0.0, at + NOTICE - time.time()))
    host.kill()
    training.settle(1)
    return found


def join_host(training: Training) -> Sample:
    """Measure from the start of Ray on a host to the first step with its worker."""
    assert training.cluster is not None
    training.mid_step()
    training.cluster.others[SPARE - 1].start_ray()
    at = time.time()
    back = training.next_group(at, workers=2)
    return training.sample(at, back.at - at)


@dataclass(frozen=True)
class Case:
    """An event, with its limit in seconds."""

    what: str
    happen: Callable[[Training], Sample]
    target: float
    """Limit in seconds."""
    again: int | None = None
    """Steps that may be repeated."""
    every: int = 1
    """Run this case only in every n-th round: its detection takes half a minute and hardly varies."""


KILL = partial(signal_worker, signal.SIGKILL)
STOP = partial(signal_worker, signal.SIGSTOP)
ON_ONE_HOST = (
    Case("SIGKILL of the first worker", partial(KILL, True), 24),
    Case("SIGKILL of another worker", partial(KILL, False), 24, 1),
    Case("SIGSTOP of the first worker", partial(STOP, True), 45, every=3),
    Case("SIGSTOP of another worker", partial(STOP, False), 45, every=3),
    Case("SIGTERM, to the end", terminate_driver, 5, again=0),
    Case("SIGKILL of the driver, same command", kill_driver, 20),
)
ON_HOSTS = (
    Case("host is drained", drain_host, 30, 0),
    Case("host joins", join_host, 60, 0),
)
HEADER = (
    "SmolLM2-135M, 2 workers",
    "seconds",
    "from - to",
    "a step",
    "target",
    "",
    "steps again",
    "longest gap",
)


def measure(storage: Path, models: Path, count: int, found: dict[Case, list[Sample]]) -> None:
    """Trigger every case so often, or as its `every` says, and add the samples to `found`.

    If a case fails, the later cases of its run are skipped, and the failure is printed.
    """
    with processes.scratch() as folder:
        words = settings(storage / "one", models, ())
        _repeat(Training(Run(CONFIG, folder, WATCHED, changes=words)), ON_ONE_HOST, count, found)
    if hosts.possible():
        words = settings(storage / "hosts", models, ELASTIC)
        with cluster(CONFIG, WATCHED, changes=words) as several:
            _repeat(Training(several.run, several), ON_HOSTS, count, found)
    else:
        _say("hosts that are drained and join: needs root and network namespaces")


def _repeat(
    training: Training, cases: tuple[Case, ...], count: int, found: dict[Case, list[Sample]]
) -> None:
    try:
        training.start()
        for turn in range(count):
            for case in (case for case in cases if turn % case.every == 0):
                sample = case.happen(training)
                found.setdefault(case, []).append(sample)
                _say(
                    f"{case.what}: {sample.seconds:.1f} s, {sample.again} steps again, gap {sample.gap:.1f} s"
                )
    except (AssertionError, StopIteration, psutil.Error, subprocess.SubprocessError) as error:
        _say(f"given up: {error}")


def settings(storage: Path, models: Path, changes: tuple[str, ...]) -> tuple[str, ...]:
    storage.mkdir(parents=True)
    (storage / "models").symlink_to(models)
    return (f"run.storage={storage}", *SETTINGS, *changes)


def targets(found: dict[Case, list[Sample]]) -> str:
    """Return the table; a case without a measurement has a line too."""
    return table(HEADER, [row(case, found.get(case, [])) for case in (*ON_ONE_HOST, *ON_HOSTS)])


def row(case: Case, samples: list[Sample]) -> tuple[str, ...]:
    if not samples:
        return (case.what, "-", "-", "-", f"{case.target:.0f}", "not measured", "-", "-")
    seconds = [sample.seconds for sample in samples]
    again, gap = max(sample.again for sample in samples), max(sample.gap for sample in samples)
    met = median(seconds) <= case.target and (case.again is None or again <= case.again)
    return (
        case.what,
        f"{median(seconds):.1f}",
        f"{min(seconds):.1f} - {max(seconds):.1f}",
        f"{median(sample.step for sample in samples):.1f}",
        f"{case.target:.0f}",
        "met" if met else "missed",
        str(again),
        f"{gap:.1f}",
    )


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
