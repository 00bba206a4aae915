"""MLflow becomes unreachable and reachable again: a real server that is killed, a cut connection."""

import logging
import os
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.utils import rest_utils
from sqlalchemy.exc import OperationalError

from olora_ray.config.schema import Config
from olora_ray.tracking import client as reach
from olora_ray.tracking import run
from olora_ray.tracking.start import check_artifacts, start_run
from tests import tiny
from tests.mlflow_server import Server
from tests.refused import refused
from tests.tracking.one_run import local, rows, series, steps
from tests.waiting import until

CLOSED = "http://127.0.0.1:9"
SYSTEM = "system/cpu_utilization_percentage"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    running.wait()
    yield running
    running.kill()


def times(tracker: run.Tracker, name: str) -> list[int]:
    return [item.timestamp for item in tracker.client().get_metric_history(tracker.run_id, name)]


def settings(uri: str) -> Config:
    return tiny.config(tracking__uri=uri, run__storage="unused")


def threads() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name in ("mlflow", "system metrics")
    ]


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@dataclass
class Outage:
    """The observations during the outage."""

    training: run.Tracker
    """A run that continues training."""
    taken_up: run.Tracker
    """A run whose driver was killed, resumed during the outage."""
    asked_here: int = 0
    """Requests from the thread that trains."""
    upload: float = 0.0
    pending: int = 0
    flushed_while_away: bool = True
    messages: list[str] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def outage(server: Server) -> Iterator[Outage]:
    """The story: two runs write, the server is killed, both runs continue, the server starts again."""
    config, kept = settings(server.uri), Kept()
    logging.getLogger().addHandler(kept)
    try:
        training = start_run(config, "training", {})
        training.watch_system(0.2)
        training.metrics(rows(0, 20))
        killed = start_run(config, "killed driver", {})
        killed.params({"a": 1})
        killed.metrics(rows(0, 30))
        assert training.flush(20)
        assert killed.flush(20)
        killed._queue.close()  # its driver is dead, its run is still RUNNING
        until(lambda: steps(training, SYSTEM))
        server.kill()
        seen = Outage(training, start_run(config, "killed driver", {}, killed.run_id))
        _away(seen)
        server.start()
        server.wait()
        for tracker in (seen.training, seen.taken_up):
            assert tracker.flush(40)
        until(lambda: times(training, SYSTEM)[-1] > times(training, "train/lr")[-1])
        seen.messages = list(kept.lines)
        for tracker in (seen.training, seen.taken_up):
            seen.statuses.append(tracker.client().get_run(tracker.run_id).info.status)
            tracker.end()
        yield seen
    finally:
        logging.getLogger().removeHandler(kept)


def _away(seen: Outage) -> None:
    here, send = threading.get_ident(), requests.Session.send

    def noted(*arguments: Any, **more: Any) -> requests.Response:
        seen.asked_here += threading.get_ident() == here
        return send(*arguments, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(requests.Session, "send", noted)
        for begin in range(20, 40, 4):
            # Steps that are repeated after a failure are logged again.
            seen.training.metrics(rows(begin - 6, begin + 4))
            time.sleep(0.3)  # a step takes a while
    seen.taken_up.params({"a": 1, "b": 2})
    seen.taken_up.metrics(rows(0, 50))  # the complete history
    seen.pending = seen.taken_up.pending

    def upload() -> None:
        with refused("tracking.uri=http://", reach.TrackingUnavailable):
            seen.training.text("x", "x.txt")

    seen.upload = seconds(upload)
    seen.flushed_while_away = seen.training.flush(0.2)


def test_the_series_has_no_gap_and_no_step_twice(outage: Outage) -> None:
    for name in ("train/loss", "train/lr"):
        expected = [(step, row[name]) for step, row in rows(0, 40).items()]
        assert sorted(series(outage.training, name)) == expected


def test_a_run_taken_up_while_the_server_is_away_has_no_step_twice(outage: Outage) -> None:
    for name in ("train/loss", "train/lr"):
        expected = [(step, row[name]) for step, row in rows(0, 50).items()]
        assert sorted(series(outage.taken_up, name)) == expected
    assert outage.taken_up.client().get_run(outage.taken_up.run_id).data.params == {
        "a": "1",
        "b": "2",
    }
    assert outage.statuses == ["RUNNING", "RUNNING"]


def test_training_does_not_wait(outage: Outage) -> None:
    assert outage.asked_here == 0
    assert outage.pending == 100  # MLflow has not been asked yet for its values
    assert not outage.flushed_while_away
    assert outage.upload < 15


def test_one_line_when_it_goes_and_one_when_it_is_back(outage: Outage) -> None:
    gone = [line for line in outage.messages if line.startswith("MLflow does not answer (")]
    back = [line for line in outage.messages if line.startswith("MLflow answers again, ")]
    assert len(gone) == len(back) == 2  # one per tracker
    assert (
        "MLflow answers again, 40 values written" in back
    )  # of 100, the values that MLflow lacked
    assert set(outage.messages) == {*gone, *back}
    assert all(
        line.endswith("); metrics wait and training continues") and len(line) < 160 for line in gone
    ), gone


def test_the_end_says_so_when_mlflow_does_not_answer() -> None:
    others = threads()
    tracker = run.Tracker(CLOSED, "0" * 32)
    tracker.watch_system(0.1)
    tracker.metrics(rows(0, 3))
    with refused("tracking.uri=http://127.0.0.1:9", reach.TrackingUnavailable):
        tracker.end("FAILED", seconds=0.5)
    assert threads() == others


def test_a_new_run_needs_mlflow_and_a_known_one_does_not() -> None:
    with refused("no MLflow server answers", reach.TrackingUnavailable):
        start_run(settings(CLOSED), "new", {})
    known = start_run(settings(CLOSED), "known", {}, "0" * 32)
    assert known.run_id == "0" * 32
    with pytest.raises(reach.TrackingUnavailable):
        known.end(seconds=0.1)


def test_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    reach.connect(CLOSED)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "8"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"

        def ask() -> None:
            with (
                pytest.raises(reach.TrackingUnavailable),
                reach.reachable(uri),
            ):
                raise AssertionError("nobody answers")

        assert seconds(ask) < 6


def answer(status: int, text: str) -> requests.Response:
    """Return the answer of a server."""
    found = requests.Response()
    found.status_code, found._content = status, text.encode()
    return found


def said_by_a_database(text: str) -> Callable[[], None]:
    """Return SQLAlchemy's error for a database driver, under MLflow's own error, raised without `from`."""

    def fail() -> None:
        try:
            raise OperationalError("SELECT 1", {}, sqlite3.OperationalError(text))
        except OperationalError as error:
            raise MlflowException(error, TEMPORARILY_UNAVAILABLE)  # noqa: B904

    return fail


DENIALS: dict[str, Callable[[], object]] = {
    "a proxy": lambda: rest_utils.verify_rest_response(
        answer(401, "<html>log in</html>"), "/api/2.0/x"
    ),
    "PostgreSQL": said_by_a_database('FATAL:  password authentication failed for user "mlflow"'),
}


@pytest.mark.parametrize("case", DENIALS)
def test_a_refused_access_is_one_line(address: str, case: str) -> None:
    """No traceback: a token may have expired during the run, or lack a permission."""
    local(address).end()
    with refused("access is refused") as caught, reach.reachable(address):
        DENIALS[case]()
    assert caught.value.exit_code == 2


def test_a_database_that_has_no_room_for_another_client_is_waited_for(address: str) -> None:
    """Unlike a refused password, it may pass: with exit code 75 a night is tried again."""
    local(address).end()
    with (
        refused("too many clients", reach.TrackingUnavailable),
        reach.reachable(address),
    ):
        said_by_a_database("FATAL:  too many clients already")()
    with (
        refused("the disk there is full") as caught,
        reach.reachable(address),
    ):
        said_by_a_database("database or disk is full")()
    assert not isinstance(caught.value, reach.TrackingUnavailable)


def test_the_driver_of_a_database_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for driver in ("psycopg", "psycopg2"):  # psycopg2 for SQLAlchemy before 2.1
        monkeypatch.setitem(sys.modules, driver, None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"postgresql://127.0.0.1:{server.getsockname()[1]}/mlflow"
        with refused("psycopg") as caught:
            reach.check_uri(address)
    assert str(caught.value).startswith(f"tracking.uri={address}: needs the Python package psycopg")


def test_a_server_of_mlflow_2_is_refused_before_a_training(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no logged models, which showed only when the model was registered."""

    def search(*_: object, **__: object) -> object:
        return rest_utils.verify_rest_response(
            answer(404, "<!doctype html>"), "/api/2.0/mlflow/logged-models/search"
        )

    config = tiny.config(tracking__uri=address, run__storage="unused")
    check_artifacts(config, address)
    monkeypatch.setattr(reach.connect(address).__class__, "search_logged_models", search)
    with refused("older than MLflow 3"):
        check_artifacts(config, address)
