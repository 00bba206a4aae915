"""What MLflow does not take is left out with a warning, and all else is written."""

import contextlib
import sqlite3

import pytest

from olora_ray.tracking import run, write_queue
from tests.tracking.one_run import local, rows, series, steps


def test_a_metric_that_mlflow_refuses_does_not_take_others_with_it(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = local(address)
    tracker.params({"not?allowed": 1})
    tracker.metrics({step: {"a": 1.0, "not?allowed": 2.0, "b": 3.0} for step in range(3)})
    assert tracker.flush(10)  # a refused name is asked for once, also if it comes in another request
    tracker.metrics({3: {"a": 1.0, "not?allowed": 2.0}})
    tracker.end()
    assert (steps(tracker, "a"), steps(tracker, "b")) == ([0, 1, 2, 3], [0, 1, 2])
    assert caplog.text.count("MLflow refuses the metric not?allowed: ") == 1
    assert caplog.text.count("MLflow refuses parameters: ") == 1


def test_a_value_that_mlflow_fails_at_is_left_out_and_all_others_are_written(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = local(address)
    tracker.metrics({step: {"a": 1.0 + step, "b": 2.0} for step in range(20)})
    tracker.metrics({2**63: {"a": 1.0, "b": 2.0}, 2**63 + 1: {"a": 1.0}})  # no 64 bits: an INTERNAL_ERROR for ever
    tracker.metrics({step: {"a": 1.0 + step, "b": 2.0} for step in range(20, 50)})
    tracker.tags({"later": "x"})
    tracker.end(seconds=30)
    assert series(tracker, "a") == [(step, 1.0 + step) for step in range(50)]
    assert steps(tracker, "b") == list(range(50))
    run_data = tracker.client().get_run(tracker.run_id).data
    assert run_data.tags["later"] == "x"
    assert write_queue._TAG not in run_data.tags
    lines = [record.getMessage() for record in caplog.records]
    assert sum("MLflow fails at a of step 9223372036854775808 and 1 more each time" in line for line in lines) == 1
    assert sum("MLflow fails at b of step 9223372036854775808 each time" in line for line in lines) == 1


def test_a_write_that_mlflow_fails_at_is_left_out_and_the_next_is_written(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = local(address)
    tracker.tags({"bad": "\ud800"})  # which no database takes
    tracker.tags({"good": "2"})
    tracker.metrics(rows(0, 5))
    tracker.end(seconds=30)
    found = tracker.client().get_run(tracker.run_id).data.tags
    assert found["good"] == "2"
    assert "bad" not in found
    assert steps(tracker, "train/loss") == list(range(5))
    assert caplog.text.count("MLflow fails at tags each time (") == 1


def test_nothing_is_left_out_while_mlflow_takes_nothing_else_either(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(write_queue, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(write_queue, "_LAST_PAUSE", 0.05)
    tracker = local(address)
    with contextlib.closing(sqlite3.connect(address.removeprefix("sqlite:///"), isolation_level=None)) as file:
        file.execute("CREATE TRIGGER refuse BEFORE INSERT ON tags BEGIN SELECT RAISE(ABORT, 'no'); END")
        tracker.metrics({2**63: {"train/loss": 1.0}} | rows(0, 5))
        assert not tracker.flush(3), "far more than poisoned.ATTEMPTS"
        assert tracker.pending == 11
        assert "left out" not in caplog.text
        file.execute("DROP TRIGGER refuse")
    tracker.end(seconds=30)
    assert steps(tracker, "train/loss") == list(range(5))
    assert caplog.text.count("left out") == 1


def test_a_run_that_was_deleted_meanwhile(address: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = local(address)
    tracker.client().delete_run(tracker.run_id)
    for gone in (tracker.run_id, "0" * 32):
        other = run.Tracker(address, gone)
        other.metrics(rows(0, 3))
        assert other.flush(10)
        assert caplog.text.count(f"MLflow run {gone} is gone: nothing more is tracked") == 1
        other._queue.close()
    tracker.end()
