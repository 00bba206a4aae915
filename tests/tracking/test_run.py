import contextlib
import json
import logging
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from olora_ray.common import node_cache
from olora_ray.config.load import flatten
from olora_ray.config.schema import Config
from olora_ray.tracking import client as client_module
from olora_ray.tracking import run as tracking
from olora_ray.tracking.start import everywhere, resolve_uri, start_run
from tests import mlflow_database, tiny
from tests.refused import refused

CLOSED = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SQLite database for all tests here."""
    return mlflow_database.place(tmp_path_factory.mktemp("tracking") / "runs")


@pytest.fixture
def settings(storage: Path) -> Config:
    return tiny.config(run__storage=str(storage))


@pytest.fixture
def tracker(settings: Config) -> Iterator[tracking.Tracker]:
    tracker = start_run(settings, "test", {"olora.method": "olora"})
    yield tracker
    tracker.end()


def run_of(tracker: tracking.Tracker) -> Any:
    assert tracker.flush(10)
    return tracker.client().get_run(tracker.run_id)


def test_where_runs_are_tracked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(tiny.config(run__storage="runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri(tiny.config(tracking__uri="sqlite:///a.db")) == f"sqlite:///{tmp_path}/a.db"
    assert resolve_uri(tiny.config(tracking__uri="sqlite:////x/a.db")) == "sqlite:////x/a.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert resolve_uri(tiny.config()) == "http://server:5000"
    assert resolve_uri(tiny.config(tracking__uri="http://other")) == "http://other"


def test_another_process_is_told_where_runs_are_tracked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri, told in (
        (None, f"sqlite:///{tmp_path}/runs/mlflow.db"),
        ("sqlite:///a.db", f"sqlite:///{tmp_path}/a.db"),
        ("http://server:5000", "http://server:5000"),
    ):
        assert everywhere(tiny.config(run__storage="runs", tracking__uri=uri)) == told
    secret = "postgresql://ann:c4n4ry@db/mlflow"
    for name, value in {
        "MLFLOW_TRACKING_URI": secret,
        "OURS": secret,
        "PLAIN": "http://other:5000",
    }.items():
        monkeypatch.setenv(name, value)
    assert everywhere(tiny.config()) == "env:MLFLOW_TRACKING_URI"
    assert everywhere(tiny.config(tracking__uri="env:OURS")) == "env:OURS"
    assert everywhere(tiny.config(tracking__uri="env:PLAIN")) == "http://other:5000"


def test_a_database_outlasts_the_job_that_names_it_by_a_relative_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    lasting = tmp_path / "home" / "olora_ray"
    assert (
        resolve_uri(tiny.config(tracking__uri="sqlite:///x/a.db")) == f"sqlite:///{lasting}/x/a.db"
    )
    assert (lasting / "x").is_dir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///b.db")
    assert resolve_uri(tiny.config()) == f"sqlite:///{lasting}/b.db"
    assert (
        resolve_uri(tiny.config(tracking__uri=f"sqlite:///{job}/a.db")) == f"sqlite:///{job}/a.db"
    )


def test_a_remote_storage_needs_a_server() -> None:
    with refused("tracking.uri"):
        resolve_uri(tiny.config(run__storage="s3://bucket/runs"))


@contextlib.contextmanager
def answering(status: int, text: bytes) -> Iterator[str]:
    """The address of a server that is not MLflow, or refuses us."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (CLOSED, "no MLflow server answers"),
        ("postgresql://me:secret@127.0.0.1:9/db", "me:***@"),
        ("foo://somewhere", "MLflow cannot use this address"),
        ("./mlruns", "use sqlite:////PATH/mlflow.db"),
        ("sqlite:////etc/hostname", "the database cannot be used"),
    ],
)
def test_an_address_where_nothing_is_gets_one_line_within_seconds(uri: str, message: str) -> None:
    import mlflow  # noqa: F401 - its import is not what is timed

    begin = time.perf_counter()
    with refused(message) as caught:
        client_module.check_uri(uri)
    assert time.perf_counter() - begin < 8
    assert str(caught.value).startswith("tracking.uri=")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (404, b"<html>\nno such page", "a server answers, but not an MLflow server with this path"),
        (
            403,
            b"Invalid Host header - possible DNS rebinding attack",
            "start it with --allowed-hosts '127.0.0.1:",
        ),
    ],
)
def test_a_server_that_is_not_mlflow_or_does_not_know_its_own_name(
    status: int, text: bytes, message: str
) -> None:
    with answering(status, text) as uri, refused(message) as caught:
        client_module.check_uri(uri)
    assert "\n" not in str(caught.value)


def test_a_run_has_tags_and_a_place_beside_the_storage(
    tracker: tracking.Tracker, storage: Path
) -> None:
    run = run_of(tracker)
    assert run.info.run_name == "test"
    assert run.info.artifact_uri.startswith(f"{storage}/mlartifacts/")
    assert run.data.tags["olora.method"] == "olora"
    assert run.data.tags["olora.code"] == node_cache.project(), "also where there is no git"
    assert run.info.status == "RUNNING"
    assert tracker.url() is None


def test_params_again_with_long_and_changed_values(
    tracker: tracking.Tracker, settings: Config
) -> None:
    tracker.params(flatten(settings) | {"long": "x" * 7000})
    tracker.params(flatten(settings))
    tracker.params(flatten(settings) | {"cluster.workers": 8})
    run = run_of(tracker)
    assert run.data.params["adapter.rank"] == "4"
    assert run.data.params["data.train.0.path"] == "unused.jsonl"
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["cluster.workers"] == "1"
    assert run.data.tags["resumed.cluster.workers"] == "8"


def test_datasets_are_inputs(tracker: tracking.Tracker) -> None:
    for _ in range(2):
        tracker.dataset("train", "d" * 64, "s3://bucket/train.jsonl", 400)
        tracker.dataset("eval", "e" * 64, "/data/eval.jsonl", 80, "evaluation")
    inputs = {item.dataset.name: item for item in run_of(tracker).inputs.dataset_inputs}
    assert len(run_of(tracker).inputs.dataset_inputs) == 2
    assert inputs["train"].dataset.source_type == "s3"
    assert inputs["train"].dataset.digest == "d" * 36
    assert json.loads(inputs["eval"].dataset.profile) == {"num_rows": 80}
    assert inputs["eval"].tags[0].value == "evaluation"


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = start_run(tiny.config(run__storage=str(tmp_path / "fresh")), "test", {})
    tracker.metrics({0: {"a": 1.0}})
    tracker.watch_system(0.1)
    tracker.end()
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("mlflow.store.db.utils").isEnabledFor(
        logging.ERROR
    )  # a traceback for a locked file
    for name in ("mlflow.store", "alembic"):
        assert logging.getLogger(name).getEffectiveLevel() == logging.WARNING
