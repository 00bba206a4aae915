"""A worker that dies while the other trains on, outside of the matrix's small world: other models and methods, an
object store, two runs at once. No step is done again, and the end is that of a run nobody touched."""

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from olora_ray.common import storage
from tests.pipelines import project
from tests.recovery import moments, processes, runs, table
from tests.recovery.runs import Clean, Fault, Run
from tests.recovery.test_methods import project_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG, IDLE = 5.0, 0.5
"""Seconds of watching a worker, and seconds on a processor that one which waits uses in them at most."""
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


def test_a_spare_takes_the_place_and_the_replacement_is_the_next_spare(
    clean: Clean, tiny_project: Path, tmp_path: Path
) -> None:
    """Twice: one that dies early, and one so late that its replacement still waits, or starts, when the run ends."""
    with processes.scratch() as scratch:
        paced = Fault(pace=10.0)
        run = Run(runs.written(tiny_project, tmp_path), scratch, paced, changes=("cluster.spares=1",))
        run.start()
        for count in (1, runs.STEPS - 1):
            run.wait_until(lambda: ready(scratch, 3), "no spare stands by")
            run.wait_until(lambda wanted=count: len(done(scratch)) >= wanted, f"{count} steps are never done")
            speaker = done(scratch)[-1].pid
            next(worker for worker in processes.workers(scratch) if worker.pid == speaker).kill()
        (scratch / "hurry").touch()
        assert run.wait() == 0, run.tail()
        assert (run.again(), run.initialised()) == (0, 1), run.tail()
        assert [(found.why.count("joined"), found.workers) for found in run.resumptions()] == [(1, 2)] * 2, run.tail()
    end = runs.end_state(tmp_path)
    assert runs.differences(end, clean.end) == []


def done(scratch: Path) -> list[moments.Done]:
    """The steps so far."""
    return moments.steps(moments.read(scratch))


def ready(scratch: Path, count: int) -> bool:
    """Whether so many workers are there, all of which have come as far as they get alone: steps are drawn out here."""
    before = {worker.pid: used(worker) for worker in processes.workers(scratch)}
    time.sleep(LONG)
    now = {worker.pid: used(worker) for worker in processes.workers(scratch)}
    return len(now) == count and all(
        has_torch(pid) and after - before.get(pid, 0.0) < IDLE for pid, after in now.items()
    )


def has_torch(pid: int) -> bool:
    """Whether a worker has begun to work: before, it waits for its moment, and has imported Ray alone."""
    return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()


def used(worker: psutil.Process) -> float:
    """Seconds on a processor."""
    times = worker.cpu_times()
    return float(times.user + times.system)


def loses_a_worker(run: Run) -> None:
    assert run.attempt() == 0, run.tail()
    went_on(run)


def went_on(run: Run) -> None:
    """The training was not begun anew, and the log says how it went on."""
    assert (run.folder / "marker").exists(), run.tail()
    assert (run.again(), run.initialised()) == (0, 1), run.tail()
    assert run.resumptions()[0].workers == 1, run.tail()
