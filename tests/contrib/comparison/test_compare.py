"""A comparison through its entry script, with real Ray Tune, real trainings and MLflow."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config.load import load_config
from tests.pipelines import project
from tests.ray_head import Head
from tests.recovery.processes import scratch

SCRIPT = str(project.ROOT / "pipelines" / "contrib" / "comparison" / "compare.py")
SMALL: dict[str, Any] = {
    "cluster__workers": 1,
    "cluster__cpus_per_worker": 1,
    "train__steps": 8,
    "train__eval_every": 2,
    "train__checkpoint_every": 4,
    "evaluation__scorer": None,
    "evaluation__samples": 0,
    "compare": {"tuning_rows": 6, "test_rows": 10, "rates": [0.5, 1, 2]},
}


def write(folder: Path, model: Path, **changes: Any) -> str:
    tree = project.settings(folder, model, **{**SMALL, **changes})
    tree["data"].pop("eval")
    return str(project.write_config(folder, tree))


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=project.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("*/trials/*/training.json")}


@pytest.mark.ray
@pytest.mark.slow
def test_a_comparison_from_rows_to_verdict_and_again(corpus: Path, tiny_model: Path) -> None:
    file = write(corpus, tiny_model)
    done = compare(file, "--methods", "lora,olora", "--seeds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    folder = corpus / "runs" / "small-compare"
    found = json.loads((folder / "comparison.json").read_text())
    assert found["rows"] == {"train": 44, "tuning": 6, "test": 10}
    lora, olora = found["arms"]
    assert (lora["name"], olora["name"], found["baseline"]) == ("lora", "olora", "lora")
    for arm in (lora, olora):
        assert arm["tunings"] == 3
        assert arm["lr"] > 0
        assert arm["trainable"] > 0
        assert [each["seed"] for each in arm["trainings"]] == [4, 5]
        for each in arm["trainings"]:
            assert [step for step, _ in each["curve"]] == [0, 2, 4, 6, 8]
            # Measured once by the training, once on each row.
            assert each["loss"] == pytest.approx(each["curve"][-1][1], rel=1e-4)
            assert each["curve"][0][1] == pytest.approx(found["base_test"])
            assert each["loss"] < found["base_test"]
        assert arm["init_seconds"] > 0
        assert (
            len(
                list((folder / "shared").glob(f"{arm['name']}-*/{arm['name']}/factors.safetensors"))
            )
            == 1
        )
    against = olora["against"]
    assert against["adjusted"] == against["interval"]
    assert against["interval"]["low"] < against["mean"] < against["interval"]["high"]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "verdict: olora beside lora: " in done.stdout
    assert "left to do: " in done.stdout
    assert f"olora-ray finetune {folder}/best.yaml" in done.stdout
    assert load_config(folder / "best.yaml").run.name == "small-compare-best"
    _mlflow(folder)

    before = times(folder)
    again = compare(file, "--methods", "lora,olora", "--seeds", "2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert times(folder) == before
    kept = json.loads((folder / "comparison.json").read_text())
    assert {**kept, "seconds": 0} == {**found, "seconds": 0}

    lost = next((folder / "final" / "trials").glob("olora-*-seed5"))
    for name in (lost / "trial.json", lost / "training.json", folder / "comparison.json"):
        name.unlink()
    resumed = compare(file, "--methods", "lora,olora", "--seeds", "2")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    after = times(folder)
    assert {path for path in before if after[path] != before[path]} == {str(lost / "training.json")}


def _mlflow(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("olora").experiment_id])
    [parent] = [run for run in runs if run.data.tags.get("olora.kind") == "comparison"]
    assert parent.info.status == "FINISHED"
    assert "olora beside lora: " in parent.data.tags["olora.verdict.olora"]
    assert {"loss/lora", "loss/olora", "difference/olora"} <= parent.data.metrics.keys()
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert len(children) == len(runs) - 1 == len(list(folder.glob("*/trials/*")))
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert names >= {"report.html", "comparison.json", "learning_rates.png"}


@pytest.mark.ray
@pytest.mark.slow
def test_a_comparison_as_a_job(corpus: Path, tiny_model: Path) -> None:
    """Its own modules lie in the job's working directory."""
    file = write(corpus, tiny_model, train__steps=2, train__eval_every=1, train__checkpoint_every=2)
    with scratch() as folder:
        head = Head(folder, {})
        head.start()
        code, log = head.submit(
            "pipelines/contrib/comparison/compare.py",
            file,
            "--methods",
            "lora,olora",
            "--seeds",
            "2",
        )
    assert code == 0, log
    assert "verdict: olora beside lora: " in log
    found = json.loads((corpus / "runs" / "small-compare" / "comparison.json").read_text())
    assert all(len(each["trainings"]) == 2 for each in found["arms"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "lora,pisa"), "error: argument --methods: 'pisa' is no adapter.method"),
        (
            ("compare.test_rows=90",),
            "error: data.train: its 60 different rows do not suffice for compare.test_rows = 90",
        ),
    ],
)
def test_mistakes_are_one_line_before_any_training(
    words: tuple[str, ...], message: str, corpus: Path, tiny_model: Path
) -> None:
    done = compare(write(corpus, tiny_model), *words)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(message), done.stderr
    assert not (corpus / "runs" / "small-compare" / "tuning").exists()
