"""The harness itself: a difference is noticed, a fault reaches the process it is meant for, nothing stays behind."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import mlflow_database
from tests.recovery import moments, processes, runs
from tests.recovery.runs import EndState, Fault, Run
from tests.waiting import until

STEPS = range(1, runs.STEPS + 1)
END = EndState(
    adapter=b"weights",
    statuses=("FINISHED",),
    series={
        "train/loss": tuple((step, 1.0 / step) for step in STEPS),
        "train/step_seconds": tuple((step, 0.1 * step) for step in STEPS),
        "eval/loss": ((0, 2.0), (4, 1.0), (8, 0.5)),
    },
    versions=(1,),
    result={"steps": 8, "registered": {"version": 1}, "metrics": {"eval/loss": 0.5, "seconds": 9.0}},
)


def with_series(name: str, *points: tuple[int, float]) -> dict[str, Any]:
    return {"series": END.series | {name: points}}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "flipped byte": ({"adapter": b"weighus"}, "the adapter has other bytes"),
    "second run": ({"statuses": ("FINISHED", "FAILED")}, "MLflow runs: ('FINISHED', 'FAILED')"),
    "open run": ({"statuses": ("RUNNING",)}, "MLflow runs: ('RUNNING',)"),
    "second version": ({"versions": (2, 1)}, "registered versions: (2, 1)"),
    "no version": ({"versions": ()}, "registered versions: ()"),
    "step twice": (
        with_series("eval/loss", (0, 2.0), (4, 1.0), (4, 1.0), (8, 0.5)),
        "eval/loss: steps [4] too often, steps [] missing",
    ),
    "step missing": (
        with_series("train/loss", *END.series["train/loss"][1:]),
        "train/loss: steps [] too often, steps [1] missing",
    ),
    "other value": (with_series("eval/loss", (0, 2.0), (4, 1.0), (8, 0.6)), "eval/loss: other values"),
    "steps of another schedule": ({"result": END.result | {"steps": 7}}, "result.json: 7 steps, not 8"),
    "other result": ({"result": END.result | {"metrics": {"eval/loss": 0.6}}}, "result.json: eval/loss is 0.6"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_difference_is_noticed(case: str) -> None:
    change, problem = CHANGES[case]
    assert problem in runs.differences(dataclasses.replace(END, **change), END)


def test_times_may_differ() -> None:
    slower = dataclasses.replace(
        END,
        **with_series("train/step_seconds", *((step, 7.0) for step in STEPS)),
        result=END.result | {"metrics": {"eval/loss": 0.5, "seconds": 99.0}},
    )
    assert runs.differences(slower, END) == []


def test_a_step_that_mlflow_has_twice_is_read_twice(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder = tmp_path / "runs" / runs.NAME
    adapter = folder / "export" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "result.json").write_text("{}")
    client = MlflowClient(f"sqlite:///{mlflow_database.place(tmp_path / 'runs')}/mlflow.db")
    run = client.create_run(client.create_experiment("olora")).info.run_id
    for step, moment in ((1, 1000), (2, 2000), (2, 3000)):
        client.log_metric(run, "train/loss", 0.5, timestamp=moment, step=step)
    found = runs.end_state(tmp_path)
    assert found.series == {"train/loss": ((1, 0.5), (2, 0.5), (2, 0.5))}
    assert (found.statuses, found.versions) == (("RUNNING",), ())


def test_the_log_lines_are_read(tmp_path: Path) -> None:
    run = Run(tmp_path / "config.yaml", tmp_path, attempts=1)
    (tmp_path / "attempt-1.out").write_text(
        "10:00:00 olora initialisation: worker 0: 7 layers in 0.1 s\n"
        "10:00:09 worker 1 died (SIGKILL): training continues after step 3 of 8 with 2 workers; 2 steps done again\n"
        "10:00:19 a host has left: training continues after step 6 of ? with 1 worker; 1 step done again\n"
    )
    assert run.told_initialised() == 1
    assert run.resumptions() == [
        runs.Resumption("worker 1 died (SIGKILL):", 3, 2, 2),
        runs.Resumption("a host has left:", 6, 1, 1),
    ]


def test_what_was_done_is_counted(tmp_path: Path) -> None:
    run = Run(tmp_path / "config.yaml", tmp_path)
    assert (run.initialised(), run.again()) == (0, 0)
    what = ["initialisation", *(f"step {number}" for number in (1, 2, 3, 2, 3, 4))]
    lines = [f"{one}\t{moment}.5\t77\n" for moment, one in enumerate(what)]
    (tmp_path / "done").write_text("".join(lines) + "step 5\t7")  # the last one is being written
    assert (run.initialised(), run.again(), run.last_step()) == (1, 2, 4)
    further, again = moments.split(moments.read(tmp_path))
    assert [(one.step, one.at, one.pid) for one in further] == [(1, 1.5, 77), (2, 2.5, 77), (3, 3.5, 77), (4, 6.5, 77)]
    assert [(one.step, one.at) for one in again] == [(2, 4.5), (3, 5.5)]
    assert moments.typical(further) == 1.0


SAVES = """
import os, pathlib, sys
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
folder = pathlib.Path(sys.argv[1])
for step in (3, 6):
    checkpoint.save(folder / str(step), {}, None, {}, TrainState(step=step), {}, "")
"""


def python(folder: Path, fault: Fault, code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=runs.environment(folder, fault),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_process_dies_once_and_where_it_was_meant_to(tmp_path: Path) -> None:
    fault = Fault("checkpoint", "kill", step=6)
    first = python(tmp_path, fault, SAVES, tmp_path / "first")
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert (tmp_path / "first" / "3" / "manifest.json").exists()
    assert [file.name for file in (tmp_path / "first" / "6").iterdir()] == ["adapter.safetensors"]
    second = python(tmp_path, fault, SAVES, tmp_path / "second")
    assert second.returncode == 0, second.stderr
    assert not (tmp_path / "missing").exists()


def test_a_point_that_the_product_no_longer_has_is_told(tmp_path: Path) -> None:
    code = "import olora_fault_points as p, types; p._replace(types.ModuleType('m'), 'gone', lambda old: old)"
    assert python(tmp_path, Fault(), code).returncode == 0
    assert (tmp_path / "missing").read_text() == "m.gone"


REACHES = """
import os, pathlib
from olora_ray.common.fault_points import reached
reached("step", 1, 0)
(pathlib.Path.cwd() / f"raise-{os.getpid()}").touch()
reached("step", 2, 0)
"""


def test_a_process_fails_when_it_is_told_to(tmp_path: Path) -> None:
    done = python(tmp_path, Fault(), REACHES)
    assert "RuntimeError: injected" in done.stderr
    assert [one.step for one in moments.read(tmp_path)] == [1, 2]
    assert not list(tmp_path.glob("raise-*"))


def test_steps_are_drawn_out_until_it_hurries(tmp_path: Path) -> None:
    code = "from olora_ray.common.fault_points import reached; [reached('step', step, 0) for step in (1, 2, 3)]"
    assert python(tmp_path, Fault(pace=0.4), code).returncode == 0
    assert moments.typical(moments.read(tmp_path)) > 0.395  # the file has whole milliseconds
    (tmp_path / "hurry").touch()
    (tmp_path / "done").unlink()
    assert python(tmp_path, Fault(pace=0.4), code).returncode == 0
    assert moments.typical(moments.read(tmp_path)) < 0.395


def test_a_hidden_sitecustomize_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text("import sys\nsys.other_ran = True\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    code = "import sys; print(sys.other_ran, 'olora_fault_points' in sys.modules)"
    assert python(tmp_path, Fault(), code).stdout.split() == ["True", "True"]


def test_nothing_is_left_of_a_run_that_is_given_up() -> None:
    with processes.scratch() as folder:
        sleep = [sys.executable, "-c", "import subprocess, time; subprocess.Popen(['sleep', '99']); time.sleep(99)"]
        parent = subprocess.Popen(sleep, env=runs.environment(folder, Fault()))
        until(lambda: len(processes.processes_of(folder)) == 2, 20)
        found = processes.processes_of(folder)
        assert parent.pid in {process.pid for process in found}
    assert parent.wait(10) == -signal.SIGKILL
    assert not any(processes.is_alive(process) for process in found if psutil.pid_exists(process.pid))
    assert not folder.exists()
