"""What waits for MLflow is written once, in order, whoever adds it."""

import threading

import pytest

from olora_ray.tracking import run
from tests.tracking.one_run import local, rows, series, steps
from tests.waiting import until

SYSTEM = "system/cpu_utilization_percentage"


def test_mlflow_keeps_one_of_two_identical_rows(address: str) -> None:
    """What sending a batch again rests on."""
    from mlflow.entities import Metric

    tracker = local(address)
    batch = [Metric("a", value, 1000, step) for step, value in enumerate([1.0, float("nan"), float("inf"), 0.1])]
    for size in (2, 4, 4):
        tracker.client().log_batch(tracker.run_id, metrics=batch[:size])
    assert sorted(steps(tracker, "a")) == [0, 1, 2, 3]
    tracker.end()


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


def test_metrics_come_from_any_thread(address: str) -> None:
    tracker = local(address)
    writers = [threading.Thread(target=tracker.metrics, args=(rows(0, 1500),)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    tracker.end()
    tracker.metrics(rows(1500, 1510))  # too late
    assert sorted(steps(tracker, "train/lr")) == list(range(1500))


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


def test_a_run_that_was_deleted_meanwhile(address: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = local(address)
    tracker.client().delete_run(tracker.run_id)
    for gone in (tracker.run_id, "0" * 32):
        other = run.Tracker(address, gone)
        other.metrics(rows(0, 3))
        assert other.flush(10)
        assert caplog.text.count(f"MLflow run {gone} is gone: nothing more is tracked") == 1
        other.end()
    tracker.end()
