"""The main job end to end, through its entry script, with real Ray and MLflow."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from olora_ray.tracking.moved_storage import relocate_artifacts
from tests.pipelines import project
from tests.recovery import processes, runs
from tests.recovery.runs import Fault, Run

pytestmark = pytest.mark.ray
OWN = "{# of data.chat_template #}" + project.TEMPLATE


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which runs have the shards of those that are interrupted."""
    return runs.fault_points(tmp_path_factory.mktemp("faults"), Fault())


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, small_shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A finished run on rows and preference pairs: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("finished")
    project.make_rows(folder)
    project.make_pairs(folder / "pairs.jsonl", 30)
    project.make_pairs(folder / "eval-pairs.jsonl", 5, first=100)
    (folder / "own.jinja").write_text(OWN)
    data = project.with_pairs(folder) | {"chat_template": str(folder / "own.jinja")}
    settings = project.settings(folder, tiny_model, data=data)
    file = project.write_config(folder, settings)
    done = project.finetune(file, env=small_shards, code=0)
    return folder / "runs" / "small", done.stdout


def test_a_run_leaves_what_the_readme_promises(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 6
    assert result["registered"] == {"model": "small", "version": 1, "alias": "candidate"}
    assert result["metrics"]["eval/loss"] < result["eval_loss_before"]
    assert set(result["scores"]) == {"before", "after"}
    assert json.loads((folder / "export" / "parity.json").read_text())["ok"]
    for name in ("config.yaml", "export/adapter/adapter_config.json", "export/merged/config.json"):
        assert (folder / name).is_file()
    for name in ("README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / "export" / "adapter" / name).is_file()
    for name in ("adapter", "merged"):
        assert (folder / "export" / name / "chat_template.jinja").read_text() == OWN
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == [
        "step-0000004",
        "step-0000006",
    ]


def test_its_page_and_its_mlflow_run_say_what_it_gave(finished: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    folder, printed = finished
    result, page = (
        json.loads((folder / "result.json").read_text()),
        (folder / "report.html").read_text(),
    )
    assert str(folder / "report.html") in printed
    run = MlflowClient(result["mlflow"]["uri"]).get_run(result["mlflow"]["run_id"])
    loss = (
        f"{result['eval_loss_before']:.4f} before, {result['metrics']['eval/loss']:.4f} after step"
    )
    guard = f"{result['metrics']['eval/guard/loss']:.4f} after"
    for said in (loss, guard, "olora rank ", " tokens, ", "rejected: none", "loaded with PEFT"):
        assert said in page
        assert said in run.data.tags["mlflow.note.content"]
    for shown in ("models:/small@candidate", "<svg", ">wanted</dt>"):
        assert shown in page
    verdict = run.data.tags["mlflow.note.content"].splitlines()[0]
    assert printed.rstrip().endswith(verdict)


def test_ray_has_the_runs_result(finished: tuple[Path, str]) -> None:
    from ray.train import Result

    folder, _ = finished
    found = Result.from_path(str(folder))
    last = json.loads((folder / "result.json").read_text())["metrics"]
    assert [found.metrics[name] for name in ("step", "train/loss")] == [6.0, last["train/loss"]]
    assert found.checkpoint.path == str(folder / "checkpoints" / "step-0000006")


def test_the_log_shows_progress_and_no_wall_of_warnings(finished: tuple[Path, str]) -> None:
    _, log = finished
    lines = log.splitlines()
    (step,) = [line for line in lines if " step 4/6 | " in line]
    assert "loss" in step
    assert " tok/s, " in step
    assert "ETA" in step
    assert any(" | eval pairs: loss 0.6931" in line for line in lines)
    assert any("olora initialisation: worker 0: 7 layers" in line for line in lines)
    assert any("held-out loss: " in line and "of right answers" in line for line in lines)
    stages = [
        "merging the adapter into 14 weights",
        "checking the merged",
        "writing the adapter",
        "comparing logits",
    ]
    told = [line.partition(" export: ")[2] for line in lines if " export: " in line]
    # The adapter is written beside the merge.
    assert [sum(text.startswith(stage) for text in told) for stage in stages] == [1] * 4, told
    assert len(lines) < 70
    noise = [line for line in lines if "Warning" in line or "WARNING" in line]
    assert noise == []


def test_mlflow_has_one_run_with_an_unbroken_series(finished: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    folder, _ = finished
    result = json.loads((folder / "result.json").read_text())
    client = MlflowClient(result["mlflow"]["uri"])
    runs = client.search_runs([client.get_experiment_by_name("olora").experiment_id])
    assert [run.info.run_id for run in runs] == [result["mlflow"]["run_id"]]
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params["adapter.rank"] == "4"
    wanted = {"train/loss": [1, 2, 3, 4, 5, 6], "data/wait_fraction": [1, 2, 3, 4, 5, 6]}
    for name, steps in {**wanted, "eval/loss": [0, 3, 6], "eval/guard/loss": [0, 3, 6]}.items():
        assert [m.step for m in client.get_metric_history(runs[0].info.run_id, name)] == steps
    of_pairs = client.get_metric_history(runs[0].info.run_id, "eval/pairs/loss")
    assert of_pairs[0].value == pytest.approx(math.log(2), abs=1e-6)
    artifacts = {item.path for item in client.list_artifacts(runs[0].info.run_id)}
    assert {"parity.json", "samples.json"} <= artifacts
    assert {item.dataset.name for item in runs[0].inputs.dataset_inputs} == {
        "training",
        "evaluation",
    }


def test_the_registered_model_generates(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    folder, _ = finished
    uri = json.loads((folder / "result.json").read_text())["mlflow"]["uri"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    pipeline: Any = mlflow.transformers.load_model("models:/small@candidate")
    text = pipeline("<|user|>after 3?<|end|><|assistant|>", max_new_tokens=4)[0]["generated_text"]
    assert text.startswith("<|user|>after 3?")


def test_the_registered_model_is_measured_as_the_run_was(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = finished
    # A copy: another test compares what a run leaves.
    storage = tmp_path / "runs"
    shutil.copytree(folder.parent, storage)
    relocate_artifacts(str(folder.parent), str(storage), f"sqlite:///{storage}/mlflow.db")
    words = ("small@candidate", "--out", "measured")
    project.run_script("evaluate.py", *words, cwd=tmp_path, code=0)
    measured = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    (found,) = (each["metrics"] for each in measured["models"])
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    names = {name for name in metrics if name.startswith("eval/pairs/")} | {"eval/loss"}
    assert len(names) > 1
    for name in names:
        assert found[name] == pytest.approx(metrics[name], rel=0.01), name


def test_a_run_that_is_killed_ends_as_if_nothing_had_happened_with_fewer_workers_too(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """In make test this stands for the matrix of tests/recovery, and for other numbers of workers."""
    folder = finished[0].parent.parent
    with processes.scratch() as scratch:
        elsewhere = f"run.storage={tmp_path / 'runs'}"
        run = Run(
            folder / "config.yaml",
            scratch,
            Fault("step", "hold", step=4, rank=0),
            changes=(elsewhere,),
        )
        run.start()
        run.wait_for_fault()
        saved = (
            tmp_path / "runs" / "small" / "checkpoints" / "step-0000002"
        )  # written beside the training
        run.wait_until(saved.exists, "no checkpoint of step 2")
        run.kill_everything()
        assert run.wait() == -9, run.tail()
        run.changes += ("cluster.workers=1",)
        assert run.attempt() == 0, run.tail()
        differences = runs.differences(runs.end_state(tmp_path), runs.end_state(folder))
        assert differences == [], "\n".join([*differences, run.tail()])
        assert [(each.step, each.workers) for each in run.resumptions()] == [(2, 1)]
        assert (run.initialised(), run.again()) == (1, 2)


def test_a_finished_run_is_trained_longer_by_more_steps(
    finished: tuple[Path, str], small_shards: dict[str, str], tmp_path: Path
) -> None:
    """A copy of it is, where it lies now."""
    from mlflow import MlflowClient
    from ray.train import Result

    storage = tmp_path / "runs"
    old = finished[0].parent
    shutil.copytree(old, storage)
    relocate_artifacts(str(old), str(storage), f"sqlite:///{storage}/mlflow.db")
    file = old.parent / "config.yaml"
    before = json.loads((finished[0] / "result.json").read_text())
    done = project.finetune(
        file, f"run.storage={storage}", "train.steps=8", env=small_shards, code=0
    )
    assert (
        "train.steps was 6, is 8: training continues after step 6 with the optimizer's state"
        in done.stdout
    )
    assert "training continues after step 6 of 8" in done.stdout
    assert "olora initialisation" not in done.stdout
    metrics = Result.from_path(str(storage / "small")).metrics
    assert metrics["step"] == 8.0
    result = json.loads((storage / "small" / "result.json").read_text())
    assert (result["steps"], result["registered"]["version"]) == (8, 2)
    assert json.loads((storage / "small" / "export" / "parity.json").read_text())["step"] == 8
    assert result["mlflow"]["run_id"] == before["mlflow"]["run_id"]
    history = MlflowClient(result["mlflow"]["uri"]).get_metric_history(
        result["mlflow"]["run_id"], "train/loss"
    )
    assert [metric.step for metric in history] == list(range(1, 9))
