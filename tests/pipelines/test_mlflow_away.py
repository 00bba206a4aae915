"""The MLflow server is killed in the middle of a run, and comes back only after it."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.mlflow_server import Server
from tests.pipelines import project

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_run_ends_without_its_server_and_is_logged_later(tiny_model: Path, corpus: Path) -> None:
    server = Server(corpus)
    try:
        server.wait()
        tree = project.settings(corpus, tiny_model, train__steps=8, tracking={"uri": server.uri})
        file = project.write_config(corpus, tree)
        away = project.finetune_until(file, "step 2/8 | loss", server.kill)
        assert away.returncode == 75, away.stdout + away.stderr
        assert "step 8/8 | loss" in away.stdout
        assert "MLflow does not answer" in away.stderr
        last = away.stderr.strip().splitlines()[-1]
        assert last.startswith("error: tracking.uri=")
        assert last.endswith(
            "once MLflow answers, run the same command again to finish logging and registration"
        )
        folder = corpus / "runs" / "small"
        assert (folder / "export" / "merged" / "model.safetensors").is_file()
        assert not (folder / "result.json").exists()

        server.start()
        server.wait()
        later = project.finetune(file, code=0)
        assert "training is already finished, at step 8" in later.stdout
        assert "exporting" not in later.stdout
        result = json.loads((folder / "result.json").read_text())
        client = MlflowClient(server.uri)
        (run,) = client.search_runs([client.get_experiment_by_name("olora").experiment_id])
        assert (run.info.run_id, run.info.status) == (result["mlflow"]["run_id"], "FINISHED")
        assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == list(
            range(1, 9)
        )
        assert [m.step for m in client.get_metric_history(run.info.run_id, "eval/loss")] == [
            0,
            3,
            6,
            8,
        ]
        assert [int(item.version) for item in client.search_model_versions("name = 'small'")] == [1]
    finally:
        server.kill()
