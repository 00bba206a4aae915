"""Waiting values are written to MLflow once, in order, by any number of writers."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from olora_ray.tracking import run
from tests.tracking.one_run import local, rows, series, steps
from tests.waiting import until

SYSTEM = "system/cpu_utilization_percentage"


def test_a_run_taken_up_again_ignores_what_mlflow_has(address: str) -> None:
    first = local(address)
    first.watch_system(0.1)
    first.metrics(rows(0, 30))
    first.metrics({7: {"eval/loss": 1.0}})
    until(lambda: steps(first, SYSTEM))
    first.end("KILLED")
    before = steps(first, "system/cpu_utilization_percentage")
    assert before == list(range(len(before)))
    again = local(address, first.run_id)
    again.watch_system(0.1)
    again.metrics(rows(0, 30) | {7: {"train/loss": 99.0, "eval/loss": 99.0, "score/new": 1.0}})
    again.metrics(rows(20, 40))
    until(lambda: len(steps(again, SYSTEM)) > len(before))
    again.end()
    assert sorted(steps(again, "train/loss")) == list(range(40))
    assert 99.0 not in dict(series(again, "train/loss")).values()
    assert series(again, "eval/loss") == [(7, 1.0)]
    assert series(again, "score/new") == [(7, 1.0)]
    after = steps(again, "system/cpu_utilization_percentage")
    assert after == list(range(len(after)))
    assert len(after) > len(before) > 0


def test_a_metric_that_mlflow_refuses_does_not_take_others_with_it(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = local(address)
    tracker.params({"not?allowed": 1})
    tracker.metrics({step: {"a": 1.0, "not?allowed": 2.0, "b": 3.0} for step in range(3)})
    assert tracker.flush(10)  # a refused name is sent once, even if later requests contain it
    tracker.metrics({3: {"a": 1.0, "not?allowed": 2.0}})
    tracker.end()
    assert (steps(tracker, "a"), steps(tracker, "b")) == ([0, 1, 2, 3], [0, 1, 2])
    assert caplog.text.count("MLflow refuses the metric not?allowed: ") == 1
    assert caplog.text.count("MLflow refuses parameters: ") == 1


def test_a_write_that_the_server_always_fails_at_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Regression: HTTP 500 for one key, as for an emoji in a MySQL column, ended every run with exit code 75."""
    written: dict[str, list[int]] = {}
    with mlflow_that_fails_at({"bad"}, written) as uri:
        tracker = run.Tracker(uri, "0" * 32, fresh=True)
        tracker.metrics({step: {"a": 1.0, "bad": 2.0, "b": 3.0} for step in range(3)})
        tracker.tags({"bad": "x"})
        tracker.metrics({3: {"a": 1.0, "bad": 2.0}})
        tracker.end(seconds=60)
    assert (set(written["a"]), set(written["b"])) == ({0, 1, 2, 3}, {0, 1, 2})
    assert "bad" not in written
    refusals = [line for line in caplog.messages if line.startswith("MLflow refuses ")]
    assert [line.partition(":")[0] for line in refusals] == [
        "MLflow refuses the metric bad",
        "MLflow refuses tags",
    ]


def test_a_server_that_fails_at_all_writes_for_a_while_loses_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A read-only database answers reads, and is no reason to drop a metric."""
    written: dict[str, list[int]] = {}
    with mlflow_that_fails_at(failing := {"a", "olora.can_be_written"}, written) as uri:
        tracker = run.Tracker(uri, "0" * 32, fresh=True)
        tracker.metrics({step: {"a": 1.0} for step in range(3)})
        assert not tracker.flush(
            8
        )  # longer than the attempts after which a single write is dropped
        failing.clear()
        tracker.end(seconds=60)
    assert set(written["a"]) == {0, 1, 2}
    assert not [line for line in caplog.messages if line.startswith("MLflow refuses ")]


@contextlib.contextmanager
def mlflow_that_fails_at(keys: set[str], written: dict[str, list[int]]) -> Iterator[str]:
    """The address of a server that answers 500 to requests with these keys, and stores the steps of all others."""
    info = {
        "run_id": "0" * 32,
        "experiment_id": "0",
        "status": "RUNNING",
        "lifecycle_stage": "active",
    }

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            metrics = asked.get("metrics", [])
            fails = not keys.isdisjoint({asked.get("key"), *(metric["key"] for metric in metrics)})
            for metric in [] if fails else metrics:
                written.setdefault(metric["key"], []).append(int(metric["step"]))
            self.send_response(500 if fails else 200)
            self.end_headers()
            self.wfile.write(
                json.dumps({"run": {"info": info, "data": {}}, "run_info": info}).encode()
            )

        do_GET = do_POST = do_PATCH = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_run_that_was_deleted_meanwhile(address: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = local(address)
    tracker.client().delete_run(tracker.run_id)
    for gone in (tracker.run_id, "0" * 32):
        other = run.Tracker(address, gone)
        other.metrics(rows(0, 3))
        assert other.flush(10)
        assert caplog.text.count(f"MLflow run {gone} no longer exists: nothing more is logged") == 1
        other.end()
    tracker.end()
