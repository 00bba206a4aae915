"""When the driver looks for room for more workers, and what it does when they are gone; without Ray."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from olora_ray.cluster import group, ray_internals
from olora_ray.cluster.channel import Member, Started
from olora_ray.cluster.connection import Stop
from olora_ray.cluster.failures import SharedBaseDied
from olora_ray.cluster.spec import TrainResult
from olora_ray.common.errors import Stopped, StoreUnavailable, UserError
from olora_ray.pipeline import fit
from olora_ray.pipeline.fit import Supervisor
from tests import tiny
from tests.refused import refused
from tests.waiting import until

Does = Callable[[int], TrainResult]


class Training:
    """A training whose channel, workers and Ray are played here, on a clock that goes by `look` with each look."""

    def __init__(self) -> None:
        self.now, self.room, self.ended = 0.0, 1, 0
        self.look = 5.0
        self.events: dict[float, Any] = {}
        """Time -> what the workers tell the driver then."""
        self.members: list[Member] = []
        self.silent: list[Member] = []
        self.draining: set[str] = set()
        self.hung: list[str] = []
        self.worker = {"CPU": 1.0}
        self.groups: list[int] = []
        self.asked: list[object] = []
        self.told: list[str] = []
        self.stop, self.does = Stop(), list[Does]()
        self._end = threading.Event()

    def looks(self, _: object) -> None:
        self.now += self.look

    def end(self) -> None:
        self.ended += 1
        self.silent = []
        self._end.set()

    def collect(self, on_event: Callable[[Any], None]) -> None:
        for at in [at for at in self.events if at <= self.now]:
            on_event(self.events.pop(at))

    def works(self, workers: int) -> TrainResult:
        """Train until the driver ends the trainers."""
        assert self._end.wait(30)
        self._end.clear()
        raise RayActorError

    def until(self, seconds: float) -> Does:
        """Train for so long."""

        def work(workers: int) -> TrainResult:
            while self.now < seconds:
                threading.Event().wait(0.01)
            return TrainResult()

        return work

    def fit(self, workers: int) -> TrainResult:
        self.groups.append(workers)
        return self.does.pop(0)(workers)

    def attempts(self, *does: Does, placed: bool = False, **settings: Any) -> Supervisor:
        """Attempts of which each `does` this; the last one may be missing, and finishes the training."""
        self.does = [*does, lambda workers: TrainResult()]

        def remote(answer: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=answer)

        channel: Any = SimpleNamespace(
            members=remote(lambda silence: (self.members, self.silent)),
            request_stop=remote(self.asked.append),
            result=remote(lambda: self.looks(None)),
            begin=remote(lambda: None),
        )
        progress = SimpleNamespace(line=self.told.append, total=8)
        telemetry = SimpleNamespace(ended=lambda: None, started=lambda *_, **__: None)
        monitor: Any = SimpleNamespace(
            channel=channel, progress=progress, highest=0, collect=self.collect, telemetry=telemetry
        )
        spec: Any = SimpleNamespace(config=tiny.decided(**settings), train=tiny.store(8))
        return Supervisor(spec, None, monitor, self.stop, self.worker, self.fit, placed)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    found = Training()
    clock = SimpleNamespace(monotonic=lambda: found.now, sleep=found.looks)
    answers: dict[tuple[Any, str], Any] = {
        (fit, "time"): clock,
        (group, "answer"): lambda call: call,
        (group, "end_hung"): lambda member: found.hung.append(member.actor),
        (fit, "free_workers"): lambda worker: found.room,
        (fit, "free_abandoned"): lambda: 0,
        (ray_internals, "end_train_controllers"): found.end,
        (ray_internals, "draining_nodes"): lambda: found.draining,
    }
    for (module, name), told in answers.items():
        monkeypatch.setattr(module, name, told)
    return found


def raising(error: Exception) -> Does:
    def work(workers: int) -> TrainResult:
        raise error

    return work


def returning(**result: Any) -> Does:
    return lambda workers: TrainResult(**result)


@pytest.mark.parametrize(("passes", "code"), [(True, 75), (False, 2)])
def test_what_passes_by_itself_on_a_worker_does_so_for_the_driver(
    training: Training, passes: bool, code: int
) -> None:
    with refused("the store does not answer") as caught:
        training.attempts(returning(problem="the store does not answer", passes=passes)).run()
    assert caught.value.exit_code == code


@pytest.mark.parametrize(("limit", "ends"), [(1, True), (0, False)])
def test_a_worker_that_hangs_is_ended_with_its_group_and_counts(
    training: Training, limit: int, ends: bool
) -> None:
    training.events = {0.0: Started(1)}
    training.silent = [Member(1, "node", 2**22, "hangs")]
    attempts = training.attempts(training.works, cluster__max_failures=limit)
    why = "worker 1 gave no sign of life for 20 s"
    if ends:
        assert attempts.run() == TrainResult()
        assert training.told[-1] == f"{why}: starting the workers again"
    else:
        with refused("training failed after 0 restarts"):
            attempts.run()
    assert training.hung == ["hangs"]
    assert training.ended >= 1


@pytest.mark.parametrize("error", [UserError("9 of 20 rows cannot be used"), RayActorError()])
def test_a_failed_preparation_of_the_data_ends_the_training(
    training: Training, error: Exception
) -> None:
    def waits_for_a_shard(workers: int) -> TrainResult:
        until(lambda: training.asked)
        return TrainResult(interrupted="training has ended")

    def join() -> None:
        raise error

    attempts = training.attempts(waits_for_a_shard)
    attempts.build = SimpleNamespace(problem=error, join=join)  # type: ignore[assignment]
    with pytest.raises(type(error)) as caught:
        attempts.run()
    assert caught.value is error
    assert training.groups == [1]


def test_workers_whose_node_will_be_taken_away_are_asked_to_stop(training: Training) -> None:
    training.events = {0.0: Started(1)}
    training.members = [Member(0, "0123456789", 1, "one")]
    training.draining = {"0123456789", "other"}
    attempts = training.attempts(lambda workers: training.until(40)(workers))
    attempts.run()
    assert training.asked == ["node 01234567 is preempted"]


def test_the_seconds_of_all_groups_are_counted_for_the_cost(training: Training) -> None:
    training.events, training.worker = {0.0: Started(2)}, {"CPU": 2.0, "GPU": 0.5}
    training.look = 20.0
    training.members = [Member(rank, "0123456789", 1, "one") for rank in (0, 1)]

    def dies(workers: int) -> TrainResult:
        training.until(1000)(workers)
        raise RayActorError

    kept: list[dict[str, float]] = []
    attempts = training.attempts(dies, training.until(2000))
    attempts.keep_used = lambda used: kept.append(dict(used))
    attempts.run()
    assert kept[-1]["CPU"] == pytest.approx(2000 * 2 * 2, rel=0.02)
    assert kept[-1]["GPU"] == pytest.approx(2000 * 2 * 0.5, rel=0.02)
    assert len(kept) == 5, "every 10 minutes, and at the end of each group"


@pytest.mark.parametrize(("kind", "code"), [(StoreUnavailable, 75), (ValueError, 2)])
def test_a_store_that_was_away_through_all_restarts_may_be_back_later(
    training: Training, kind: type[Exception], code: int
) -> None:
    text = f"Traceback ...\n{kind.__module__}.{kind.__name__}: s3://b: no answer\n"
    error = WorkerGroupError(
        "", {0: UserExceptionWithTraceback(kind("s3://b: no answer"), traceback_str=text)}
    )
    with refused("training failed after 0 restarts") as caught:
        training.attempts(raising(error), cluster__max_failures=0).run()
    assert caught.value.exit_code == code


def test_a_training_whose_place_is_kept_waits_for_no_room(training: Training) -> None:
    """Processes that trials share may fill the cluster: nothing is free before the search ends, and its trials hung."""
    training.room = 0
    died = raising(SharedBaseDied())
    attempts = training.attempts(died, placed=True, cluster__max_failures=1)
    assert attempts.run() == TrainResult()
    assert training.groups == [1, 1]
    assert attempts.cause == "the process that several trials share died"


def test_a_stop_is_granted_where_no_worker_could_do_it(training: Training) -> None:
    training.stop.asked = "SIGTERM"
    with pytest.raises(Stopped) as caught:
        training.attempts(training.works).run()
    assert str(caught.value).startswith("stopped while no worker was training (SIGTERM)")
    assert caught.value.exit_code == 143
    assert fit.NOBODY <= training.now < 30
    assert (training.ended, "training has ended" in training.asked) == (1, False)
