"""A scorer that fails at the end of a run: one line, nothing is registered, and the same command finishes the run."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.pipelines import project

SCORER = """
def score(prediction, reference):
    if prediction != reference:
        raise RuntimeError("no such answer")
    return {"same": 1.0}
"""

MENDED = """
calls = 0

def score(prediction, reference):
    global calls
    calls += 1  # six references, then six answers of the base model, then six of the tuned one
    return {"same": prediction == reference} | ({"late": 1.0} if calls > 12 else {})
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_scorer_that_fails_leaves_no_version_and_no_training_is_repeated(
    tiny_model: Path, corpus: Path
) -> None:
    (corpus / "mine.py").write_text(SCORER)
    env = {"PYTHONPATH": f"{corpus}:{project.ROOT}"}
    file = project.write_config(
        corpus, project.settings(corpus, tiny_model, evaluation__scorer="mine:score")
    )
    failed = project.finetune(file, env=env)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "error: evaluation.scorer: mine:score fails on the answer" in failed.stderr
    assert "RuntimeError: no such answer" in failed.stderr
    assert "Traceback" not in failed.stdout + failed.stderr
    client = MlflowClient(f"sqlite:///{corpus}/runs/mlflow.db")
    assert client.search_registered_models() == []
    (corpus / "mine.py").write_text(MENDED)
    done = project.finetune(file, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training is already finished, at step 6" in done.stdout
    result = json.loads((corpus / "runs" / "small" / "result.json").read_text())
    assert (result["registered"]["version"], set(result["scores"]["after"])) == (
        1,
        {"same", "late"},
    )
    assert set(result["scores"]["before"]) == {"same"}
    assert "held-out late: 1.000 after (6 rows)" in done.stdout
