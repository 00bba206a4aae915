"""A worker that dies, outside of the matrix's small world: other models and methods, an object store, two runs at once.

The end is that of a run that nobody touched."""

from pathlib import Path
from typing import Any

import pytest

from olora_ray.common import storage
from tests.pipelines import project
from tests.recovery import processes, runs, table
from tests.recovery.runs import Clean, Fault, Run
from tests.recovery.test_methods import project_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FIRST, OTHER = (Fault("step", "kill", step=5, rank=rank) for rank in (0, 1))
ADAPTER = {"rank": 4, "alpha": 8}
CASES: dict[str, tuple[str, dict[str, Any], Fault]] = {
    "eva": ("llama", {**ADAPTER, "method": "eva", "init_tokens": 120}, OTHER),
    "mixture of experts, dropout": ("qwen3_moe", {**ADAPTER, "dropout": 0.1}, FIRST),
    "state-space blocks": ("falcon_h1", {**ADAPTER, "method": "pissa"}, OTHER),
}
"""Family, adapter, and which worker is killed."""


@pytest.mark.parametrize("case", list(CASES))
def test_with_other_models_and_methods(case: str, tmp_path: Path, rows: list[table.Row]) -> None:
    family, adapter, fault = CASES[case]
    corpus = project_of(family, tmp_path / "project")
    for name in ("clean", "killed"):
        (tmp_path / name).mkdir()
    clean = runs.run_clean(corpus, tmp_path / "clean", adapter=adapter)
    row = table.Row(f"kill worker, {case}")
    rows.append(row)
    with processes.scratch() as scratch:
        run = Run(runs.written(corpus, tmp_path / "killed", adapter=adapter), scratch, fault)
        loses_a_worker(run)
        row.again, row.lost = run.again(), run.seconds - clean.seconds
        end = runs.end_state(tmp_path / "killed")
        row.same_bytes = end.adapter == clean.end.adapter
        assert runs.differences(end, clean.end) == [], run.tail()
    row.recovered = True


@pytest.fixture(scope="module")
def clean(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    return runs.run_clean(tiny_project, tmp_path_factory.mktemp("clean"))


def test_on_an_object_store(bucket: str, clean: Clean, tiny_project: Path, tmp_path: Path) -> None:
    remote = project.on_s3(tiny_project, bucket, tmp_path / "mlflow.db")
    with processes.scratch() as scratch:
        run = Run(runs.written(tiny_project, tmp_path, **remote), scratch, FIRST, extra={"HOME": str(scratch)})
        loses_a_worker(run)
    adapter = storage.read_bytes(f"{bucket}/small/export/adapter/adapter_model.safetensors")
    assert adapter == clean.end.adapter
    assert storage.names(f"{bucket}/small/checkpoints")[-2:] == ["step-0000006", "step-0000008"]


def test_two_runs_at_once(clean: Clean, tiny_project: Path, tmp_path: Path) -> None:
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
        assert adapter.read_bytes() == clean.end.adapter


def loses_a_worker(run: Run) -> None:
    assert run.attempt() == 0, run.tail()
    went_on(run)


def went_on(run: Run) -> None:
    """The training was not begun anew, and the log says how it went on: after its last whole step, or a checkpoint."""
    assert (run.folder / "marker").exists(), run.tail()
    assert run.initialised() == 1, run.tail()
    assert run.again() <= runs.CHECKPOINT_EVERY, run.tail()
    assert [found.workers for found in run.resumptions()] == [2], run.tail()
    assert "PeerLost" not in (run.folder / "attempt-1.err").read_text()  # a consequence, with a long traceback
