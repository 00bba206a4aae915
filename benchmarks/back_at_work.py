"""Seconds until a run trains again after something has happened to it: the cases that recovery.py measures.

A case happens again and again to one run without end, each time after the run has settled: all its workers train, and
have done some steps since. Steps are timed where they are done (fault points of tests/recovery), not where the driver
logs them, up to a second later; of which group a step is, the log says.
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
"""Steps that all workers have done since the last change."""
PATIENCE = 300.0
"""Seconds after which something counts as never happening."""
NOTICE = 15
"""Seconds from the notice that a host will be taken away to that."""
SPARE = 2
"""Which of the hosts, counted from 1, is drained and joins."""


@dataclass(frozen=True)
class Sample:
    """What one event has cost."""

    seconds: float
    again: int
    """Steps that were done again."""
    gap: float
    """The longest time between two steps, until all was as before."""
    step: float = 0.0
    """Seconds of a step just before it happened."""


@dataclass
class Training:
    """A run without end."""

    run: Run
    cluster: Cluster | None = None
    seen: int = field(default=0)
    """Lines of the log about changes of the group, when the last event happened."""

    def start(self) -> None:
        self.run.start()
        self.settle()

    def steps(self) -> list[Done]:
        """All that were done so far."""
        return moments.steps(moments.read(self.run.folder))

    def settle(self, workers: int = 2) -> None:
        """Wait until so many workers train, and have done some steps since."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            told, done = len(self.run.resumptions()), len(self.steps())
            self._wait(partial(self._more_than, done + SETTLED), "the run does not settle")
            found = self.run.resumptions()
            if len(found) == told and (found[-1].workers if found else 2) == workers:
                return
        raise AssertionError(f"{workers} workers never train for long\n{self.run.tail()}")

    def mid_step(self) -> float:
        """The time now, in the middle of a step; what the log says from here on is said of what happens now."""
        done = self.steps()
        self._wait(partial(self._more_than, len(done)), "no other step is done")
        time.sleep(0.4 * moments.typical(done[-SETTLED:]))
        self.seen = len(self.run.resumptions())
        return time.time()

    def next_step(self, at: float, strangers: Iterable[int] = ()) -> Done:
        """The first step that is done after this time, by another process than these."""
        gone = frozenset(strangers)
        self._wait(lambda: any(one.at > at and one.pid not in gone for one in self.steps()), "no step follows")
        return next(one for one in self.steps() if one.at > at and one.pid not in gone)

    def next_group(self, at: float, workers: int) -> Done:
        """The first step that a new group of so many workers has done."""
        self._wait(lambda: self._began_after(workers), f"no group of {workers} follows")
        first = self._began_after(workers)[-1] + 1
        self._wait(lambda: any(one.at > at and one.step == first for one in self.steps()), f"no step {first} follows")
        return next(one for one in self.steps() if one.at > at and one.step == first)

    def sample(self, at: float, seconds: float, workers: int = 2) -> Sample:
        """What has cost these seconds, once so many workers train again."""
        self.settle(workers)
        return summary(self.steps(), at, seconds)

    def _began_after(self, workers: int) -> list[int]:
        """The steps after which groups of so many have begun since the last event."""
        return [one.step for one in self.run.resumptions()[self.seen :] if one.workers == workers]

    def _more_than(self, count: int) -> bool:
        return len(self.steps()) > count

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        self.run.wait_until(condition, what, PATIENCE)


def summary(steps: list[Done], at: float, seconds: float) -> Sample:
    """A sample from all steps that were done, for an event at this time."""
    _, again = moments.split(steps)
    gaps = [after.at - before.at for before, after in pairwise(steps) if after.at > at]
    step = moments.typical([one for one in steps if one.at <= at][-SETTLED - 1 :])
    return Sample(seconds, sum(one.at > at for one in again), max(gaps, default=0.0), step)


def signal_worker(number: signal.Signals, first: bool, training: Training) -> Sample:
    """To the next step, after a signal to the worker that speaks for the group, or to another one."""
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
    """From SIGTERM to the end, less what the step under way takes; then the command is given again."""
    at = training.mid_step()
    training.run.terminate_driver()
    code, end = training.run.wait(PATIENCE), time.time()
    assert code == 143, f"after SIGTERM the command has ended with {code}\n{training.run.tail()}"
    under_way = next((one.at for one in training.steps() if one.at > at), at)
    training.run.start()
    return training.sample(at, end - under_way)


def kill_driver(training: Training) -> Sample:
    """From the same command, given after SIGKILL of the driver, to its next step."""
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
    """From the notice that a host will be taken away to the first step of those that stay; then it is killed."""
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
    """From a host's Ray that has started to the first step with its worker."""
    assert training.cluster is not None
    training.mid_step()
    training.cluster.others[SPARE - 1].start_ray()
    at = time.time()
    back = training.next_group(at, workers=2)
    return training.sample(at, back.at - at)


@dataclass(frozen=True)
class Case:
    """Something that happens, and how long it may take."""

    what: str
    happen: Callable[[Training], Sample]
    target: float
    """Seconds."""
    before: float | None = None
    """Seconds when every change of the workers was a restart of all of them."""
    again: int | None = None
    """Steps that may be done again."""
    rest: float = 0.0
    """Seconds before it happens, in which a spare gets ready."""
    every: int = 1
    """It happens every so many times: one that takes half a minute to be noticed, and always the same."""


KILL = partial(signal_worker, signal.SIGKILL)
STOP = partial(signal_worker, signal.SIGSTOP)
ON_ONE_HOST: dict[tuple[str, ...], tuple[Case, ...]] = {
    (): (
        Case("SIGKILL of the first worker", partial(KILL, True), 5, 14, 1),
        Case("SIGKILL of another worker", partial(KILL, False), 5, 14, 1),
        Case("SIGSTOP of the first worker", partial(STOP, True), 30, every=3),
        Case("SIGSTOP of another worker", partial(STOP, False), 30, every=3),
        Case("SIGTERM, to the end", terminate_driver, 5, again=0),
        Case("SIGKILL of the driver, same command", kill_driver, 12),
    ),
    # Of the first one only: a spare is a worker process too, and may not be told from the others.
    ("cluster.spares=1",): (Case("SIGKILL of the first worker, a spare", partial(KILL, True), 3, 14, 1, rest=60.0),),
}
"""More settings of a run -> what happens to it."""
ON_HOSTS = (
    Case("host is drained", drain_host, 10, 51, 0),
    Case("host joins", join_host, 10, 47, 0),
)
HEADER = (
    "SmolLM2-135M, 2 workers",
    "seconds",
    "from - to",
    "a step",
    "before",
    "target",
    "",
    "steps again",
    "longest gap",
)


def measure(storage: Path, models: Path, count: int, found: dict[Case, list[Sample]]) -> None:
    """Let every case happen so many times, or as its `every` says, and add what is found to `found`.

    One that fails ends those after it in its run, and is told.
    """
    for number, (changes, cases) in enumerate(ON_ONE_HOST.items()):
        with processes.scratch() as folder:
            words = settings(storage / f"one-{number}", models, changes)
            _repeat(Training(Run(CONFIG, folder, WATCHED, changes=words)), cases, count, found)
    if hosts.possible():
        words = settings(storage / "hosts", models, ELASTIC)
        with cluster(CONFIG, WATCHED, changes=words) as several:
            _repeat(Training(several.run, several), ON_HOSTS, count, found)
    else:
        _say("hosts that are drained and join: needs root and network namespaces")


def _repeat(training: Training, cases: tuple[Case, ...], count: int, found: dict[Case, list[Sample]]) -> None:
    try:
        training.start()
        for turn in range(count):
            for case in (case for case in cases if turn % case.every == 0):
                time.sleep(case.rest)
                sample = case.happen(training)
                found.setdefault(case, []).append(sample)
                _say(f"{case.what}: {sample.seconds:.1f} s, {sample.again} steps again, gap {sample.gap:.1f} s")
    except (AssertionError, StopIteration, psutil.Error, subprocess.SubprocessError) as error:
        _say(f"given up: {error}")


def settings(storage: Path, models: Path, changes: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a run with a storage of its own, which has the models already."""
    storage.mkdir(parents=True)
    (storage / "models").symlink_to(models)
    return (f"run.storage={storage}", *SETTINGS, *changes)


def targets(found: dict[Case, list[Sample]]) -> str:
    """The table; cases that were not measured have lines too."""
    cases = [*(case for group in ON_ONE_HOST.values() for case in group), *ON_HOSTS]
    return table(HEADER, [row(case, found.get(case, [])) for case in cases])


def row(case: Case, samples: list[Sample]) -> tuple[str, ...]:
    """A line: the median of the seconds, all of them, and the most of the rest."""
    before = "-" if case.before is None else f"{case.before:.0f}"
    if not samples:
        return (case.what, "-", "-", "-", before, f"{case.target:.0f}", "not measured", "-", "-")
    seconds = [sample.seconds for sample in samples]
    again, gap = max(sample.again for sample in samples), max(sample.gap for sample in samples)
    met = median(seconds) <= case.target and (case.again is None or again <= case.again)
    return (
        case.what,
        f"{median(seconds):.1f}",
        f"{min(seconds):.1f} - {max(seconds):.1f}",
        f"{median(sample.step for sample in samples):.1f}",
        before,
        f"{case.target:.0f}",
        "met" if met else "missed",
        str(again),
        f"{gap:.1f}",
    )


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
