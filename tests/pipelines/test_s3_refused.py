"""What is wrong with an object store is one line of the command, before a model is loaded or Ray started."""

import subprocess
from pathlib import Path
from typing import Any

from tests.pipelines import project
from tests.s3_server import Server, dead_port


def command(script: str, folder: Path, place: str, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    tree: dict[str, Any] = project.settings(
        folder,
        folder / "model-that-is-not-there",
        run__storage=place,
        tracking={"uri": f"sqlite:///{folder}/mlflow.db"},
    )
    return project.run_script(script, project.write_config(folder, tree), *more, env=env, timeout=100)


def line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    found = [text for text in done.stderr.splitlines() if text]
    assert len(found) == 1, done.stderr
    return found[0]


def test_a_bucket_that_is_not_there(s3_server: Server, bucket: str, corpus: Path) -> None:
    done = command("finetune.py", corpus, "s3://none/runs", {})
    assert line(done, 2).startswith(
        "error: run.storage: s3://none/runs cannot be written: there is no bucket of this name"
    )


def test_a_dead_server(bucket: str, corpus: Path) -> None:
    done = command("finetune.py", corpus, bucket, {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{dead_port()}"})
    assert line(done, 75).startswith(f"error: run.storage: {bucket}: the object store at http://127.0.0.1:")


def test_a_retraining_meets_the_store_at_its_lock(bucket: str, corpus: Path) -> None:
    env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{dead_port()}"}
    assert "cannot be written: Could not connect" in line(command("retrain.py", corpus, bucket, env), 75)
