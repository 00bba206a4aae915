"""When the driver looks for room for more workers, and what it does when they are gone; without Ray."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import Failure, Started
from olora_ray.cluster.failures import SharedBaseDied
from olora_ray.cluster.membership.driver import WorkerGroup
from olora_ray.cluster.membership.state import Absent
from olora_ray.cluster.spec import LEFT, TrainResult
from olora_ray.common.errors import Stopped, StoreUnavailable, UserError
from olora_ray.pipeline import fit
from olora_ray.pipeline.connection import Stop
from olora_ray.pipeline.fit import Attempts
from tests import tiny

Does = Callable[[WorkerGroup], TrainResult]


class Training:
    """A training whose channel, workers and Ray are played here, on a clock that goes 5 seconds with each look."""

    def __init__(self) -> None:
        self.now, self.room, self.ended = 0.0, 1, 0
        self.events: dict[float, Any] = {}
        """Time -> what the workers tell the driver then."""
        self.running: Callable[[], bool] = lambda: False
        self.absent: Callable[[], Absent] = Absent
        self.groups: list[WorkerGroup] = []
        self.asked: list[object] = []
        self.told: list[str] = []
        self.stop, self.does = Stop(), list[Does]()
        self._end = threading.Event()

    def looks(self, _: object) -> None:
        self.now += 5.0

    def end(self) -> None:
        self.ended += 1
        self._end.set()

    def collect(self, on_event: Callable[[Any], None]) -> None:
        for at in [at for at in self.events if at <= self.now]:
            on_event(self.events.pop(at))

    def works(self, group: WorkerGroup) -> TrainResult:
        """Train until the driver ends the trainers."""
        assert self._end.wait(30)
        self._end.clear()
        raise RayActorError

    def until(self, seconds: float) -> Does:
        """Train for so long."""

        def work(group: WorkerGroup) -> TrainResult:
            while self.now < seconds:
                threading.Event().wait(0.01)
            return TrainResult()

        return work

    def fit(self, group: WorkerGroup) -> TrainResult:
        self.groups.append(group)
        return self.does.pop(0)(group)

    def attempts(self, *does: Does, changing: bool = True, placed: bool = False, **settings: Any) -> Attempts:
        """Attempts of which each `does` this; the last one may be missing, and finishes the training."""
        self.does = [*does, lambda group: TrainResult()]

        def remote(answer: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=answer)

        channel: Any = SimpleNamespace(
            absent=remote(lambda: self.absent()),
            running=remote(lambda: self.running()),
            request_stop=remote(self.asked.append),
            begin_anew=remote(lambda workers, attempt: None),
            want=remote(lambda workers: None),
        )
        progress = SimpleNamespace(line=self.told.append, total=8)
        telemetry = SimpleNamespace(ended=lambda: None, started=lambda *_, **__: None)
        monitor: Any = SimpleNamespace(
            channel=channel, progress=progress, highest=0, collect=self.collect, telemetry=telemetry
        )
        build: Any = SimpleNamespace(store=tiny.store(8), problem=None, join=lambda: None)
        spec: Any = SimpleNamespace(config=tiny.config(**settings))
        return Attempts(spec, build, monitor, self.stop, {"CPU": 1.0}, self.fit, changing, placed)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    found = Training()
    clock = SimpleNamespace(monotonic=lambda: found.now, sleep=found.looks)
    answers: dict[tuple[Any, str], Any] = {
        (fit, "time"): clock,
        (fit, "answer"): lambda call: call,
        (fit, "given"): found.looks,
        (fit, "free_workers"): lambda worker: found.room,
        (fit, "free_abandoned"): lambda: 0,
        (ray_internals, "end_train_controllers"): found.end,
        (ray_internals, "draining_nodes"): set,
    }
    for (module, name), told in answers.items():
        monkeypatch.setattr(module, name, told)
    return found


def raising(error: Exception) -> Does:
    def work(group: WorkerGroup) -> TrainResult:
        raise error

    return work


def returning(**result: Any) -> Does:
    return lambda group: TrainResult(**result)


@pytest.mark.lengthy
@pytest.mark.parametrize(("limit", "joined"), [(0, 1), (1, 2)])
def test_workers_that_fail_each_time_that_they_join_are_given_up(training: Training, limit: int, joined: int) -> None:
    training.events = {1.0: Started(1)}
    does = [training.until(180), *[raising(RuntimeError("broken"))] * 9]
    training.attempts(*does, cluster__workers=[1, 2], cluster__max_failures=limit).run()
    assert [group.first_rank for group in training.groups] == list(range(joined + 1))


@pytest.mark.lengthy
@pytest.mark.parametrize("before", [None, "worker 1 died"])
def test_when_the_first_have_left_and_the_others_are_lost_it_goes_on(training: Training, before: str | None) -> None:
    training.events = {} if before is None else {0.0: Failure(before)}
    attempts = training.attempts(returning(interrupted=LEFT))
    assert attempts.run() == TrainResult()
    assert attempts.cause == (before or "all workers were lost")
    training.stop.asked = "SIGTERM"
    with pytest.raises(Stopped, match="stopped after the loss of all workers") as caught:
        training.attempts(returning(interrupted=LEFT)).run()
    assert caught.value.exit_code == 143


@pytest.mark.parametrize(("passes", "code"), [(True, 75), (False, 2)])
def test_what_passes_by_itself_on_a_worker_does_so_for_the_driver(training: Training, passes: bool, code: int) -> None:
    with pytest.raises(UserError, match=r"^the store does not answer$") as caught:
        training.attempts(returning(problem="the store does not answer", passes=passes)).run()
    assert caught.value.exit_code == code


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("events", "began", "cause"),
    [
        ([Started(1)], True, "all workers were lost"),
        ([Started(1), Failure("worker 0 died")], True, "worker 0 died"),
        ([], True, "all workers were lost"),  # while they loaded the model
        ([], False, "some workers did not start"),
    ],
)
def test_trainers_that_the_driver_has_ended_itself_are_no_failure(
    training: Training, events: list[Any], began: bool, cause: str
) -> None:
    training.events = dict(enumerate(events))
    training.absent = lambda: Absent(nobody_for=training.now, began=began)
    attempts = training.attempts(training.works, cluster__max_failures=0)
    assert attempts.run() == TrainResult()
    assert training.now > (fit.DESERTED if began else fit.UNMET)
    assert (attempts.failures, attempts.cause, training.ended) == (0, cause, 1)
    assert training.told[-1] == f"{cause}: starting new workers"


def test_a_controller_that_dies_by_itself_is_a_failure(training: Training) -> None:
    with pytest.raises(UserError, match="training failed after 0 restarts: Train's controller died"):
        training.attempts(raising(RayActorError()), cluster__max_failures=0).run()


@pytest.mark.parametrize(("kind", "code"), [(StoreUnavailable, 75), (ValueError, 2)])
def test_a_store_that_was_away_through_all_restarts_may_be_back_later(
    training: Training, kind: type[Exception], code: int
) -> None:
    text = f"Traceback ...\n{kind.__module__}.{kind.__name__}: s3://b: no answer\n"
    error = WorkerGroupError("", {0: UserExceptionWithTraceback(kind("s3://b: no answer"), traceback_str=text)})
    with pytest.raises(
        UserError, match=r"^training failed after 0 restarts: worker 0 failed \(.*no answer\)$"
    ) as caught:
        training.attempts(raising(error), cluster__max_failures=0).run()
    assert caught.value.exit_code == code


def test_a_training_whose_place_is_kept_waits_for_no_room(training: Training) -> None:
    """Processes that trials share may fill the cluster: nothing is free before the search ends, and its trials hung."""
    training.room = 0
    died = raising(SharedBaseDied())
    attempts = training.attempts(died, changing=False, placed=True, cluster__max_failures=1)
    assert attempts.run() == TrainResult()
    assert training.groups == [WorkerGroup(1, 1), WorkerGroup(1, 2)]
    assert attempts.cause == "the process that several trials share died"


@pytest.mark.lengthy
@pytest.mark.parametrize("trains", [(0, 0), (5, 60)])
def test_a_stop_is_granted_where_no_worker_could_do_it(training: Training, trains: tuple[float, float]) -> None:
    first, last = trains
    training.running = lambda: first <= training.now < last  # a group grants the stop itself, after a step
    training.stop.asked = "SIGTERM"
    with pytest.raises(Stopped) as caught:
        training.attempts(training.works).run()
    assert str(caught.value) == "stopped while no worker was training (SIGTERM); run the same command again to resume"
    assert caught.value.exit_code == 143
    assert last + fit.NOBODY <= training.now < last + 30
    assert "; press Ctrl+C to stop at once, which loses the steps since the last" in training.told[0]
    assert (training.ended, "training has ended" in training.asked) == (1, False)


@pytest.mark.lengthy
@pytest.mark.parametrize("started", [False, True])
def test_what_the_first_workers_wait_for_is_said_once(training: Training, started: bool) -> None:
    """Who is lost later is replaced by Ray, or missed."""
    training.events = {0.0: Started(1)} if started else {}
    training.attempts(training.until(3 * fit.SLOW)).run()
    waiting = ["waiting for 1 worker to start; 1 more would fit"]
    assert training.told == ([] if started else waiting)


@pytest.mark.lengthy
def test_workers_that_do_not_change_are_waited_for_until_a_stop_is_asked_for(training: Training) -> None:
    """Of GPUs, of which one is lost: Ray waits for it without end, and nobody was left who heard of the stop."""
    lost = 2 * fit.SLOW + 60
    training.events = {2 * fit.SLOW: Started(1), lost: Failure("worker 0 died")}

    def stopping(group: WorkerGroup) -> TrainResult:
        while training.now < 2 * fit.SLOW + 5:
            threading.Event().wait(0.01)
        training.stop.asked = "SIGTERM"
        return training.works(group)

    with pytest.raises(Stopped):
        training.attempts(stopping, changing=False).run()
    assert training.told[0] == "waiting for 1 worker to start or to load the model; 1 more would fit"
    assert sum("waiting" in line for line in training.told) == 1
    assert lost + fit.NOBODY <= training.now < lost + 30
