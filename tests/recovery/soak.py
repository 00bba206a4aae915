"""A run on two hosts to which something happens all the time, and what is to hold of it in the end."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.recovery import moments, runs, tally
from tests.recovery.cluster import cluster
from tests.recovery.disturbances import Disturbances, Say
from tests.recovery.events import events
from tests.recovery.runs import Fault
from tests.recovery.tally import Cost

PACE = 0.5
"""Seconds that every step takes longer: there are not so many then, and as many faults meet a worker that computes."""
SCHEDULE: dict[str, Any] = {
    "train__global_batch": 8,
    "train__checkpoint_every": 10,
    "train__eval_every": 50,
    "train__lr": 1e-3,
    "cluster__workers": [1, 2],
    "cluster__cpus_per_worker": 1,
    "cluster__max_failures": -1,
}
SECONDS_A_STEP = 1.0
"""That a step takes at most when nobody draws it out, on a machine that has other things to do."""


@dataclass(frozen=True)
class Report:
    """What happened, and what is wrong with the end."""

    costs: dict[str, Cost]
    steps: int
    seconds: float
    commands: int
    """How often the same command was given."""
    problems: Sequence[str]

    def text(self) -> str:
        """For people."""
        count = sum(cost.times for cost in self.costs.values())
        first = (
            f"{self.steps} steps in {self.seconds:.0f} s; {count} events; "
            f"the command was given {self.commands} times"
        )
        end = "the adapter's bytes and all metrics are those of the run that nobody touched"
        return "\n".join([first, "", tally.text(self.costs), "", *(self.problems or [end])])


def soak(
    tiny_project: Path, folder: Path, minutes: float, seed: int, say: Say, logs: Path | None = None
) -> Report:
    """Train for so many minutes while events happen; the output of the commands is copied to `logs`.

    Raises AssertionError if the run stands still for too long. Nothing is left of its processes and hosts.
    """
    steps = math.ceil(minutes * 60 / PACE)  # at least as many as there is time for
    schedule = SCHEDULE | {"train__steps": steps}
    for name in ("untouched", "soaked"):
        (folder / name).mkdir()
    say(f"a run of {steps} steps that nobody touches")
    limit = runs.ATTEMPT_SECONDS + steps * SECONDS_A_STEP
    clean = runs.run_clean(tiny_project, folder / "untouched", limit, **schedule)
    say(
        f"it took {clean.seconds:.0f} s; now the same on two hosts, for {minutes:g} minutes of events"
    )
    config = runs.written(tiny_project, folder / "soaked", **schedule)
    with cluster(config, Fault(pace=PACE)) as found, _copied(found.run.folder, logs):
        soaked = Disturbances(found, say)
        soaked.begin()
        soaked.go_on(events(seed), minutes * 60)
        soaked.finish(limit)
        done = moments.read(found.run.folder)
        problems = [*soaked.problems, *_problems(found.run)]
        seconds, commands = soaked.seconds(), found.run.attempts
    problems += runs.differences(runs.end_state(folder / "soaked"), clean.end)
    return Report(tally.tally(soaked.happened, done), steps, seconds, commands, problems)


def _problems(run: runs.Run) -> list[str]:
    found = (
        [] if run.initialised() == 1 else [f"the adapter was initialised {run.initialised()} times"]
    )
    missing = run.folder / "missing"
    return found + ([f"not in the product: {missing.read_text()}"] if missing.exists() else [])


@contextlib.contextmanager
def _copied(scratch: Path, logs: Path | None) -> Iterator[None]:
    """Copy what a run has printed and done, however it ends."""
    try:
        yield
    finally:
        if logs:
            logs.mkdir(parents=True, exist_ok=True)
            for file in [*scratch.glob("attempt-*"), *scratch.glob("done")]:
                shutil.copy(file, logs)


def timed(write: Callable[[str], None]) -> Say:
    """Says lines with the time of day before them, as the run's own log has it."""
    return lambda text: write(f"{time.strftime('%H:%M:%S')} {text}")
