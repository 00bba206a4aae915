"""One run in two places, two runs in one place, and two drivers of one run."""

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.pipelines import project
from tests.ray_head import BIN, Head
from tests.recovery import processes, runs
from tests.recovery.runs import Clean, Fault, Run
from tests.waiting import until

pytestmark = pytest.mark.ray

HALF_WAY = Fault("step", "hold", step=5, rank=0)


@pytest.fixture(scope="module")
def clean(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    return runs.run_clean(tiny_project, tmp_path_factory.mktemp("clean"))


def working_folder(tiny_project: Path, folder: Path) -> Path:
    """A folder with model, rows and a config that names them, and its storage, relative to itself."""
    shutil.copytree(tiny_project, folder)
    file = runs.written(Path(), folder)
    file.write_text(file.read_text().replace(f"{folder}/", ""))
    assert str(folder) not in file.read_text()
    return folder


@pytest.mark.slow
def test_a_run_continues_in_another_folder(tiny_project: Path, clean: Clean, tmp_path: Path) -> None:
    here, there = working_folder(tiny_project, tmp_path / "here"), tmp_path / "there"
    with processes.scratch() as scratch:
        run = Run(Path("config.yaml"), scratch, HALF_WAY, cwd=here)
        run.start()
        run.wait_for_fault()
        run.kill_everything()
        assert run.wait() == -9, run.tail()
        here.rename(there)
        run.cwd = there
        assert run.attempt() == 0, run.tail()
        assert run.initialised() == 1, run.tail()
        assert [resumed.step for resumed in run.resumptions()] == [3], run.tail()
        assert runs.differences(runs.end_state(there), clean.end) == [], run.tail()
        assert not here.exists()


@pytest.mark.slow
def test_two_drivers_of_one_run(tiny_project: Path, tmp_path: Path) -> None:
    """While the first stands still the second leaves; given again it finds the work done. Nothing is there twice."""
    config = runs.written(tiny_project, tmp_path)
    with processes.scratch() as first, processes.scratch() as second:
        run = Run(config, first, HALF_WAY)
        run.start()
        run.wait_for_fault()
        assert run.driver is not None
        other = Run(config, second)
        assert other.attempt() == 75, other.tail()
        assert f"error: run.name: 'small' is already running (process {run.driver.pid} on " in other.tail()
        run.release()
        assert run.wait() == 0, run.tail()
        assert other.attempt() == 0, other.tail()
        assert any("is already finished" in line for line in other.lines()), other.tail()
        end = runs.end_state(tmp_path)
    assert (end.statuses, end.versions) == (("FINISHED",), (1,))
    for name, points in end.series.items():
        assert max(Counter(step for step, _ in points).values()) == 1, f"{name} has a step twice"


@pytest.mark.slow
def test_two_runs_on_one_machine(tiny_project: Path, clean: Clean, tmp_path: Path) -> None:
    """Each with a Ray of its own, in one storage, as if it were alone."""
    config = runs.written(tiny_project, tmp_path)
    with processes.scratch() as one, processes.scratch() as two:
        # As on any machine: MLflow's own lock for a database that is made lies in the folder for temporary files.
        shared = {"RAY_TMPDIR": str(one), "TMPDIR": str(one / "t")}
        both = [Run(config, one), Run(config, two, extra=shared, changes=("run.name=other",))]
        for run in both:
            run.start()
        for run in both:
            assert run.wait() == 0, run.tail()
            assert run.resumptions() == [], run.tail()
            errors = run._file("err").read_text()
            assert "InvalidAuthToken" not in errors
            assert "Traceback" not in errors
    for name in (runs.NAME, "other"):
        adapter = tmp_path / "runs" / name / "export" / "adapter" / "adapter_model.safetensors"
        assert adapter.read_bytes() == clean.end.adapter


@pytest.mark.slow
def test_a_job_continues_on_a_ray_that_was_started_anew(tiny_project: Path, clean: Clean, tmp_path: Path) -> None:
    """Its rows travel in the working directory, which Ray unpacks into another folder each time."""
    work = working_folder(tiny_project, tmp_path / "work")
    for name in ("olora_ray", "pipelines"):
        shutil.copytree(project.ROOT / name, work / name)
    submitted = ["submit", "--working-dir", str(work), "--", "python", "pipelines/finetune.py", "config.yaml"]
    words = [*submitted, f"run.storage={tmp_path}/runs"]
    with processes.scratch() as folder:
        head = Head(folder, runs.fault_points(folder, HALF_WAY))
        head.start()
        head.client().submit_job(entrypoint=" ".join(words[4:]), runtime_env={"working_dir": str(work)})
        until((folder / "marker").exists, 240, pause=0.2)
        processes.kill_all(folder)
    (work / "notes.txt").write_text("something else in the folder: another package")
    with processes.scratch() as folder:
        head = Head(folder, runs.fault_points(folder, Fault()))  # corpora are cut into shards as in the clean run
        head.start()
        done = subprocess.run(
            [BIN / "ray", "job", *words], env=head.submitter, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "training continues after step 3 of 8" in done.stdout
    adapter = tmp_path / "runs" / runs.NAME / "export" / "adapter" / "adapter_model.safetensors"
    assert adapter.read_bytes() == clean.end.adapter
