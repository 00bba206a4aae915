"""MLflow's files in an object store: they arrive, and a problem is reported before the training."""

import shutil
from pathlib import Path

import pytest

from olora_ray.common import storage
from olora_ray.common.errors import TryAgain
from olora_ray.config.schema import Config
from olora_ray.tracking import models, start
from olora_ray.tracking.client import TrackingUnavailable
from olora_ray.tracking.models import Contents
from tests import mlflow_database, tiny
from tests.mlflow_server import Server
from tests.refused import refused
from tests.s3_server import Faults
from tests.s3_server import Server as S3Server


@pytest.fixture
def config(bucket: str, tmp_path: Path) -> Config:
    mlflow_database.place(tmp_path / "db")
    uri = f"sqlite:///{tmp_path / 'db' / 'mlflow.db'}"
    return tiny.config(run__storage=bucket, tracking__uri=uri, tracking__experiment="on s3")


def check(config: Config) -> None:
    start.check_artifacts(config, start.resolve_uri(config))


def test_a_good_store_passes_and_nothing_is_left(
    s3_server: S3Server, bucket: str, config: Config
) -> None:
    check(config)
    assert s3_server.keys(bucket) == []


def test_a_runs_files_and_model_lie_in_the_bucket(
    s3_server: S3Server, bucket: str, config: Config, merged: Path, tmp_path: Path
) -> None:
    check(config)
    tracker = start.start_run(config, "test", {})
    tracker.text("{}", "parity.json")
    version = models.register(
        tracker, Contents(merged), "on-s3", "challenger", {"olora.eval_loss": "1.5"}
    )
    keys = s3_server.keys(storage.join(bucket, "mlartifacts"))
    assert any(key.endswith("/parity.json") for key in keys)
    assert any(key.endswith("/model/model.safetensors") for key in keys)
    found = models.find(f"models:/on-s3/{version}", tracker.uri, tmp_path / "cache").folder
    assert (found / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


@pytest.mark.parametrize("host", ["mlflow.internal", "127.0.0.1"])
def test_a_folder_of_the_servers_machine_is_told_before_a_training(
    tmp_path: Path, host: str
) -> None:
    """With --no-serve-artifacts MLflow creates the server's folder on the client; as root in a container this works."""
    place, uri = tmp_path / "server" / "artifacts" / "1", f"http://{host}:5000"
    with refused(f"{uri} keeps files in its folder {place}"):
        start.probe(place.as_uri(), uri)
    assert list(tmp_path.iterdir()) == []
    place.parent.mkdir(parents=True)  # a shared folder
    start.probe(str(place), uri)


def test_a_server_that_cannot_write_its_files_is_told_before_a_training(tmp_path: Path) -> None:
    """MLflow calls the store of such a server mlflow-artifacts:/ID, without the server's name."""
    server = Server(tmp_path)
    server.wait()
    try:
        config = tiny.config(run__storage=str(tmp_path / "runs"), tracking__uri=server.uri)
        check(config)
        assert not list((tmp_path / "artifacts").rglob("*.*"))
        shutil.rmtree(tmp_path / "artifacts")
        (tmp_path / "artifacts").write_text("a file")
        with refused("mlflow-artifacts:/"):
            check(config)
    finally:
        server.kill()


def test_a_store_without_time(s3_server: S3Server, config: Config) -> None:
    s3_server.faults = Faults(refuse=-1)
    with refused("MLflow's artifact store", TryAgain):
        check(config)


def test_a_store_that_goes_away_while_a_model_is_logged_is_unavailable(
    s3_server: S3Server, config: Config, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command finishes the work later: exit code 75, no traceback."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    tracker = start.start_run(config, "test", {})
    s3_server.faults = Faults(refuse=-1)
    with pytest.raises(TrackingUnavailable):
        tracker.artifact(merged / "config.json")
