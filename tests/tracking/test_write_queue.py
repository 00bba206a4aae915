"""What waits for MLflow is written once, in order, whoever adds it."""

import threading

import pytest

from olora_ray.tracking import write_queue
from tests.tracking.one_run import local, locked, rows, series, steps
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


def test_what_there_is_no_room_for_may_come_again(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(write_queue, "_MOST_VALUES", 10)
    tracker = local(address)
    with locked(address):
        tracker.metrics(rows(0, 20))
        tracker.metrics(rows(20, 40))
        assert tracker.pending == 10
    assert tracker.flush(10)
    for begin in range(0, 40, 5):
        tracker.metrics(rows(0, begin + 5))
        assert tracker.flush(10)
    tracker.end()
    assert sorted(steps(tracker, "train/loss")) == list(range(40))
    assert caplog.text.count("newer ones are not kept until it answers") == 1
