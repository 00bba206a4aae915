"""Interrupted runs outside of the matrix's small world: other models and methods, two runs at once.

The end is that of a run that nobody touched."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.families import zoo
from tests.families.variants import ALL
from tests.pipelines import project
from tests.recovery import processes, runs
from tests.recovery.runs import EndState, Fault, Run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FIRST, OTHER = (Fault("step", "kill", step=5, rank=rank) for rank in (0, 1))
CASES: dict[str, tuple[str, dict[str, Any], Fault]] = {
    "kill worker, mixture of experts, dropout": ("qwen3_moe", {"adapter__dropout": 0.1}, FIRST),
    "kill worker, state-space blocks": ("falcon_h1", {"adapter__method": "pissa"}, OTHER),
    "kill everything, eva, initialisation": (
        "llama",
        {"adapter__method": "eva", "adapter__init_tokens": 120},
        Fault("initialise", rank=1),
    ),
    "kill everything, eva on Gemma 3, middle step": (
        "gemma3_text",
        {"adapter__method": "eva", "adapter__init_tokens": 120},
        Fault("step", step=5, rank=1),
    ),
    "kill everything, milora on Qwen 3, checkpoint": (
        "qwen3",
        {"adapter__method": "milora"},
        Fault("checkpoint", step=6),
    ),
    "kill everything, answers before training, middle step": (
        "llama",
        {"evaluation__scorer": "exact_match", "evaluation__samples": 2},
        Fault("step", step=5, rank=1),
    ),
}
"""Family, settings, and what happens where."""


@pytest.mark.parametrize("case", list(CASES))
def test_with_other_models_and_methods(case: str, tmp_path: Path) -> None:
    family, changes, fault = CASES[case]
    corpus = project_of(family, tmp_path / "project")
    for name in ("clean", "killed"):
        (tmp_path / name).mkdir()
    clean = runs.run_clean(corpus, tmp_path / "clean", **changes)
    with processes.scratch() as scratch:
        run = Run(runs.written(corpus, tmp_path / "killed", **changes), scratch, fault)
        if fault.kind == "kill":
            loses_a_worker(run)
        else:
            run.start()
            run.wait_for_fault()
            run.kill_everything()
            assert run.wait() == -9, run.tail()
            assert run.attempt() == 0, run.tail()
        end = runs.end_state(tmp_path / "killed")
        assert runs.differences(end, clean) == [], run.tail()
        assert end.result.get("scores") == clean.result.get("scores"), run.tail()


def project_of(family: str, folder: Path) -> Path:
    """Return the tiny project with a model of another family."""
    project.make_tiny(folder)
    if family != "llama":
        shutil.rmtree(folder / "model")
        zoo.build(ALL[family], folder / "model")
    return folder


@pytest.fixture(scope="module")
def clean(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> EndState:
    return runs.run_clean(tiny_project, tmp_path_factory.mktemp("clean"))


def test_two_runs_at_once(clean: EndState, tiny_project: Path, tmp_path: Path) -> None:
    """Each loses a worker at the same step."""
    config = runs.written(tiny_project, tmp_path)
    with processes.scratch() as one, processes.scratch() as two:
        both = [Run(config, one, FIRST), Run(config, two, OTHER, changes=("run.name=other",))]
        for run in both:
            run.start()
        for run in both:
            assert run.wait() == 0, run.tail()
            went_on(run)
    for name in (runs.NAME, "other"):
        adapter = tmp_path / "runs" / name / "export" / "adapter" / "adapter_model.safetensors"
        assert adapter.read_bytes() == clean.adapter


def loses_a_worker(run: Run) -> None:
    assert run.attempt() == 0, run.tail()
    went_on(run)


def went_on(run: Run) -> None:
    """The training was not begun anew, and the log says how it went on: after its last whole step, or a checkpoint."""
    assert (run.folder / "marker").exists(), run.tail()
    assert run.initialised() == 1, run.tail()
    assert run.again() <= runs.CHECKPOINT_EVERY, run.tail()
    assert [found.workers for found in run.resumptions()] == [2], run.tail()
    assert (
        "PeerLost" not in (run.folder / "attempt-1.err").read_text()
    )  # a consequence, with a long traceback
