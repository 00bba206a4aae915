"""Canary secrets in the environment of a run are found nowhere afterwards: no file, no database, no log."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.mlflow_server import Server
from tests.pipelines import project

pytestmark = pytest.mark.ray

CANARIES = {
    "HF_TOKEN": "hf_c4n4ryHub",
    "MLFLOW_TRACKING_PASSWORD": "c4n4ryMlflow",
    "MLFLOW_TRACKING_TOKEN": "c4n4ryBearer",
    "AWS_SECRET_ACCESS_KEY": "c4n4ryCloud",
    "AWS_SESSION_TOKEN": "c4n4rySession",
    "NOTIFY_URL": "https://hooks.slack.com/services/c4n4ryHook",
}
CANARY = b"c4n4ry"


@pytest.fixture
def ray_files() -> Iterator[Path]:
    """Where Ray writes its logs in these tests; sockets lie there too, so the path is short."""
    folder = Path("/tmp") / f"olora-canary-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def holding(folder: Path, canary: bytes = CANARY) -> list[str]:
    """The files below a folder that hold the canary; the folder must hold some files."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return [str(file) for file in files if canary in file.read_bytes()]


@pytest.mark.slow
def test_secrets_of_the_environment_stay_there(
    tiny_model: Path, corpus: Path, ray_files: Path
) -> None:
    secret = {
        **CANARIES,
        "OUR_MLFLOW": f"sqlite:///{corpus}/hidden.db",
        "RAY_TMPDIR": str(ray_files),
    }
    named = {"tracking": {"uri": "env:OUR_MLFLOW"}, "notify": {"url": "env:NOTIFY_URL"}}
    tree = project.settings(corpus, tiny_model, **named)
    done = project.finetune(project.write_config(corpus, tree), env=secret)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert CANARY.decode() not in output
    assert holding(corpus) == []
    assert holding(ray_files) == []
    assert (
        holding(corpus, b"env:OUR_MLFLOW") != []
    )  # config.yaml, and so on: what is looked for would be found
    with sqlite3.connect(corpus / "hidden.db") as tracked:
        assert tracked.execute("SELECT count(*) FROM model_versions").fetchone() == (1,)


@pytest.fixture
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with a user, and its folder."""
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder, auth=("ann", "c4n4ryMlflow"))
    server.wait()
    yield server, folder
    server.kill()


@pytest.mark.slow
def test_a_server_with_users(
    guarded: tuple[Server, Path], tiny_model: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, folder = guarded
    tree = project.settings(corpus, tiny_model, train__steps=2, tracking={"uri": server.uri})
    file = project.write_config(corpus, tree)
    user = {"MLFLOW_TRACKING_USERNAME": "ann"}

    wrong = project.finetune(file, env={**user, "MLFLOW_TRACKING_PASSWORD": "c4n4ryWrong"}, code=2)
    assert wrong.stderr.strip() == (
        f"error: tracking.uri={server.uri}: the server refuses access; set MLFLOW_TRACKING_USERNAME and _PASSWORD,"
        " or MLFLOW_TRACKING_TOKEN"
    )
    assert not (corpus / "runs" / "small").exists()

    right = project.finetune(file, env={**user, "MLFLOW_TRACKING_PASSWORD": "c4n4ryMlflow"}, code=0)
    address = server.uri.replace("://", "://ann:c4n4ryMlflow@")
    named = {"MLFLOW_TRACKING_URI": address}
    inside = project.finetune(
        file, "run.name=other", "tracking.uri=env:MLFLOW_TRACKING_URI", env=named, code=0
    )
    assert "ann:***@" in inside.stdout
    refused = project.finetune(file, f"tracking.uri={address}", code=2)
    assert "MLFLOW_TRACKING_PASSWORD" in refused.stderr

    for done in (wrong, right, inside, refused):
        assert CANARY.decode() not in done.stdout + done.stderr
    assert holding(corpus) == []
    assert holding(folder) == []
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "c4n4ryMlflow")
    versions = MlflowClient(server.uri).search_model_versions("name = 'small'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
