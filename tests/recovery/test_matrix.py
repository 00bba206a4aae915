"""Interrupt a run at any moment: what it leaves is what an untouched run leaves."""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines import project
from tests.recovery import processes, runs
from tests.recovery.runs import EndState, Fault, Run

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # in make test: tests/pipelines/test_finetune.py

# Where: (phase of the fault point, step, rank). Checkpoints lie at 0, 3, 6 and 8, evaluations at 0, 4 and 8.
POINTS: dict[str, tuple[str, int | None, int | None]] = {
    "preparation": ("shard", None, None),
    "initialisation": ("initialise", None, 1),
    "reference pass": ("reference", None, 1),
    "early step": ("step", 1, 0),
    "middle step": ("step", 5, 1),
    "last step": ("step", 8, 0),
    "evaluation": ("evaluate", 4, 1),
    "checkpoint": ("checkpoint", 6, None),
    "export": ("export", None, None),
    "registration": ("register", None, None),
}
TRAINING = (
    "initialisation",
    "reference pass",
    "early step",
    "middle step",
    "last step",
    "evaluation",
    "checkpoint",
)
UNDER_WAY = ("early step", "middle step", "evaluation", "checkpoint")
"""Points at which a checkpoint lies behind and steps lie ahead."""
UNSAVED = ("preparation", "initialisation", "reference pass")
"""Points that initialised factors may not outlive: workers begin while the tokens are made, and save at step 0."""
HAPPENINGS = {
    "kill worker": [point for point in POINTS if point != "registration"],
    "exception in worker": [point for point in POINTS if point != "registration"],
    "kill controller": list(TRAINING),
    "SIGTERM": list(POINTS),
    "kill everything": list(POINTS),
}
WITH_PAIRS = ("reference pass", "middle step", "evaluation")
CASES = [
    pytest.param(what, where, False, id=f"{what}, {where}")
    for what, points in HAPPENINGS.items()
    for where in points
    if where != "reference pass"
]
CASES += [
    pytest.param(what, where, True, id=f"{what}, {where}, pairs")
    for what in HAPPENINGS
    for where in WITH_PAIRS
]

HEARD_SECONDS = 1.5
"""After which the driver has seen a signal; it looks once a second."""
STEP_SECONDS = 0.1
"""By which steps are drawn out where workers have to hear something between two of them."""


@pytest.fixture(scope="module")
def clean(
    tiny_project: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], EndState]:
    @cache
    def of(pairs: bool) -> EndState:
        changes = data(tiny_project, pairs)
        return runs.run_clean(tiny_project, tmp_path_factory.mktemp("clean"), **changes)

    return of


def data(tiny_project: Path, pairs: bool) -> dict[str, Any]:
    """The changes for a run on rows, or on rows and pairs in the same packs."""
    return {"data": project.with_pairs(tiny_project)} if pairs else {}


@pytest.mark.parametrize(("what", "where", "pairs"), CASES)
def test_an_interrupted_run_ends_as_if_nothing_had_happened(
    what: str,
    where: str,
    pairs: bool,
    clean: Callable[[bool], EndState],
    tiny_project: Path,
    tmp_path: Path,
) -> None:
    wanted = clean(pairs)
    with processes.scratch() as scratch:
        config = runs.written(tiny_project, tmp_path, **data(tiny_project, pairs))
        run = Run(config, scratch, fault(what, where))
        interrupt(run, what, where)
        end = runs.end_state(tmp_path)
        problems = [*runs.differences(end, wanted), *log_problems(run, what, where)]
        assert not problems, "\n".join([*problems, run.tail()])


def fault(what: str, where: str) -> Fault:
    phase, step, rank = POINTS[where]
    kind = {"kill worker": "kill", "exception in worker": "raise"}.get(what, "hold")
    return Fault(phase, kind, step, rank, pace=STEP_SECONDS if what == "SIGTERM" else 0.0)


def interrupt(run: Run, what: str, where: str) -> None:
    """Let it happen, and give the command again where a user has to."""
    run.start()
    run.wait_for_fault()
    if what == "kill controller":
        run.kill_controller()
        run.release()
    elif what == "SIGTERM":
        stop(run, where)
    elif what == "kill everything":
        run.kill_everything()
        assert run.wait() == -9, run.tail()
    if what in ("SIGTERM", "kill everything"):
        run.start()
    code = run.wait()
    if what == "exception in worker" and where not in TRAINING and code != 0:
        code = run.attempt()  # a bug in a task may end the command, but not the run
    assert code == 0, run.tail()


def stop(run: Run, where: str) -> None:
    """SIGTERM; the rest of the steps is so short that the driver has to hear it before they continue."""
    run.terminate_driver()
    if where in TRAINING:
        time.sleep(HEARD_SECONDS)
    run.release()
    assert run.wait() == 143, run.tail()
    if is_resumed("SIGTERM", where):
        _, step, rank = POINTS[where]
        late = run.last_step() - (step or 0)
        # The step under way; where another worker stands still, the first has asked for this one already.
        assert late <= 1 + (rank == 1), f"{late} steps were done after the signal\n{run.tail()}"


def is_resumed(what: str, where: str) -> bool:
    """Whether training has to be resumed: unless it ends by itself while its last but one checkpoint waits."""
    return where in UNDER_WAY and (what, where) != ("SIGTERM", "checkpoint")


def log_problems(run: Run, what: str, where: str) -> list[str]:
    """What is wrong with the log: each attempt to train is told, and none initialises again what is saved."""
    found, resumptions = [], run.resumptions()
    most = 2 if where in UNSAVED else 1
    if not 1 <= run.initialised() <= most or run.told_initialised() > most:
        found.append(
            f"initialised {run.initialised()} times, and the log says {run.told_initialised()}"
        )
    if is_resumed(what, where) and len(resumptions) != 1:
        found.append(f"training was resumed once, the log says so {len(resumptions)} times")
    if where in ("export", "registration") and resumptions:
        found.append(f"nothing was to be trained again, but the log says {resumptions}")
    found += [
        f"no word about what happened: {one}" for one in resumptions if not one.why.strip(" ;:,.")
    ]
    found += [f"not two workers: {one}" for one in resumptions if one.workers != 2]
    if run.again() > (0 if what == "SIGTERM" else 2 * runs.CHECKPOINT_EVERY):
        found.append(f"{run.again()} steps were done again")
    if sum(one.again for one in resumptions) > run.again():
        found.append(f"{run.again()} steps were done again, but the log says {resumptions}")
    return found
