"""pipelines/evaluate.py gives what lm-eval gives, for two models side by side, and keeps it."""

import json
import math
from pathlib import Path

import pytest

from tests.evaluation import sets
from tests.pipelines import project

LIMIT = 8
TASKS = ("arc_easy", "boolq")


@pytest.mark.ray
@pytest.mark.slow
def test_two_models_stand_side_by_side_and_are_logged(
    tiny_model: Path, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    data, other = sets.write(tmp_path / "sets"), project.make_model(tmp_path / "other", layers=1)
    file = project.write_config(
        corpus, project.settings(corpus, tiny_model, cluster={"cpus_per_worker": 0.5})
    )
    arguments = f"--tasks {','.join(TASKS)} --limit {LIMIT} --task-data {data} --out {tmp_path}/out"
    ended = project.run_script(
        "evaluate.py", tiny_model, other, "--config", file, *arguments.split(), code=0
    )
    assert "95% interval" in ended.stdout
    tree = json.loads((tmp_path / "out" / "evaluation.json").read_text())

    for found in tree["models"]:
        assert found["tasks"] == dict.fromkeys(TASKS, f"validation[:{LIMIT}]")
    first, second = (item["metrics"] for item in tree["models"])
    assert first["eval/perplexity"] == pytest.approx(math.exp(first["eval/loss"]))
    assert tree["differences"].keys() == first.keys() == second.keys()
    for name, found in tree["differences"].items():
        assert found["mean"] == pytest.approx(first[name] - second[name], abs=1e-9)
        assert found["low"] <= found["mean"] <= found["high"]

    assert logged(corpus / "runs" / "mlflow.db") == [first, second]


def logged(database: Path) -> list[dict[str, float]]:
    """The metrics of the evaluations in MLflow, the oldest first, without standard errors."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    runs = client.search_runs(
        [item.experiment_id for item in client.search_experiments()],
        "tags.`olora.kind` = 'evaluation'",
        order_by=["attributes.start_time ASC"],
    )
    return [
        {k: v for k, v in run.data.metrics.items() if not k.endswith("_stderr")} for run in runs
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "no rows to evaluate it on; set --tasks, or --config"),
        (["{model}", "--task", "boolq"], "argument --task: unknown; did you mean --tasks?"),
        (
            ["{model}", "--config", "{config}", "--out", "{config}"],
            "argument --out: {config} cannot be written: ",
        ),
    ],
)
def test_mistakes_are_one_line(
    tiny_model: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    from olora_ray.config import command_line
    from pipelines import evaluate

    file = project.write_config(corpus, project.settings(corpus, tiny_model))
    words = [word.format(model=tiny_model, config=file) for word in arguments]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit) as ended:
        command_line.run(evaluate.main)
    assert ended.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message.format(config=file) in errors[-1]
    assert errors[-1].startswith("error: ")
