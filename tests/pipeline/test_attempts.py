"""When the driver looks for room for more workers, and what it does when they are gone; without Ray."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import Failure
from olora_ray.cluster.failures import SharedBaseDied
from olora_ray.cluster.membership.driver import WorkerGroup
from olora_ray.cluster.membership.state import Absent
from olora_ray.cluster.spec import LEFT, TrainResult
from olora_ray.common.errors import Stopped, StoreUnavailable, UserError
from olora_ray.pipeline import fit as attempts
from olora_ray.pipeline.connection import Stop
from olora_ray.pipeline.fit import Attempts
from tests import tiny


class Ray:
    """What the driver asks of Ray, answered here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room, self.ended = 1, 0
        self.now = 1000.0
        """The driver's clock."""
        answers: dict[tuple[Any, str], Any] = {
            (attempts, "answer"): lambda call: call,
            (attempts, "given"): lambda channel: None,
            (attempts, "free_workers"): lambda worker: self.room,
            (attempts, "free_abandoned"): lambda: 0,
            (ray_internals, "end_train_controllers"): self.end,
            (ray_internals, "draining_nodes"): set,
        }
        for (module, name), told in answers.items():
            monkeypatch.setattr(module, name, told)

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(monkeypatch)


@pytest.fixture
def clock(cluster: Ray, monkeypatch: pytest.MonkeyPatch) -> Ray:
    """With what the driver takes for the time."""
    told = SimpleNamespace(monotonic=lambda: cluster.now, sleep=lambda seconds: None)
    monkeypatch.setattr(attempts, "time", told)
    return cluster


def attempts_of(**settings: Any) -> Attempts:
    """Attempts at a training whose workers may change, with a channel that has nothing to tell."""
    channel: Any = SimpleNamespace(
        absent=SimpleNamespace(remote=Absent),
        drain=SimpleNamespace(remote=list),
        request_stop=SimpleNamespace(remote=lambda why: None),
    )
    told: list[str] = []
    progress = SimpleNamespace(line=told.append, told=told, total=8)
    monitor: Any = SimpleNamespace(
        channel=channel,
        progress=progress,
        highest=0,
        collect=lambda on_event: None,
        telemetry=SimpleNamespace(ended=lambda: None),
    )
    build: Any = SimpleNamespace(store=tiny.store(8), problem=None, join=lambda: None)
    spec: Any = SimpleNamespace(config=tiny.config(**settings))
    return Attempts(spec, build, monitor, Stop(), {"CPU": 1.0}, lambda group: TrainResult(), changing=True)


@pytest.mark.parametrize(("failures", "limit", "added"), [(0, 0, [1]), (3, 3, [1]), (4, 3, []), (9, -1, [1])])
def test_workers_that_fail_each_time_that_they_join_are_given_up(
    failures: int, limit: int, added: list[int], cluster: Ray
) -> None:
    cluster.room = 5
    asked: list[int] = []
    limits = SimpleNamespace(max_workers=lambda: 2, max_failures=limit)
    driver: Any = SimpleNamespace(
        spec=SimpleNamespace(config=SimpleNamespace(cluster=limits)),
        changing=True,
        worker={},
        _trainers=SimpleNamespace(workers=1, failures=failures, add=asked.append),
        _running=True,
        _asked=False,
        _room=1,
    )
    Attempts._grow(driver)
    assert asked == added


@pytest.mark.parametrize(("before", "cause"), [(None, "no worker was left"), ("worker 1 died", "worker 1 died")])
def test_when_the_first_have_left_and_the_others_are_lost_it_goes_on(before: str | None, cause: str) -> None:
    driver = attempts_of()
    driver.cause = before
    assert not driver._is_final(TrainResult(interrupted=LEFT))
    assert driver.cause == cause
    driver.stop.asked = "SIGTERM"
    with pytest.raises(Stopped, match="stopped while no worker was left") as caught:
        driver._is_final(TrainResult(interrupted=LEFT))
    assert caught.value.exit_code == 143


@pytest.mark.parametrize(("passes", "code"), [(True, 75), (False, 2)])
def test_what_passes_by_itself_on_a_worker_does_so_for_the_driver(passes: bool, code: int) -> None:
    with pytest.raises(UserError, match=r"^the store does not answer$") as caught:
        attempts_of()._is_final(TrainResult(problem="the store does not answer", passes=passes))
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("running", "before", "cause"),
    [
        (True, None, "all workers were lost"),
        (True, "worker 0 died", "worker 0 died"),
        (False, None, "all workers were lost"),  # while they loaded the model
    ],
)
def test_trainers_that_the_driver_has_ended_itself_are_no_failure(
    running: bool, before: str | None, cause: str, cluster: Ray
) -> None:
    driver = attempts_of(cluster__max_failures=0)
    driver._running, driver.cause = running, before
    driver._watch()
    assert not cluster.ended
    driver.channel.absent.remote = lambda: Absent(nobody_for=attempts.DESERTED + 1)
    driver._watch()
    assert cluster.ended
    driver._failed(RayActorError())
    assert (driver.failures, driver.cause) == (0, cause)
    assert driver.progress.told == [f"{cause}: starting others"]
    driver._deserted = ""
    with pytest.raises(UserError, match="training failed after 0 restarts: Train's controller died"):
        driver._failed(RayActorError())


@pytest.mark.parametrize(("kind", "code"), [(StoreUnavailable, 75), (ValueError, 2)])
def test_a_store_that_was_away_through_all_restarts_may_be_back_later(kind: type[Exception], code: int) -> None:
    text = f"Traceback ...\n{kind.__module__}.{kind.__name__}: s3://b: no answer\n"
    error = WorkerGroupError("", {0: UserExceptionWithTraceback(kind("s3://b: no answer"), traceback_str=text)})
    with pytest.raises(
        UserError, match=r"^training failed after 0 restarts: worker 0 failed \(.*no answer\)$"
    ) as caught:
        attempts_of(cluster__max_failures=0)._failed(error)
    assert caught.value.exit_code == code


def test_a_first_group_that_is_not_complete_is_waited_for_longer(cluster: Ray) -> None:
    driver = attempts_of()
    driver.channel.absent.remote = lambda: Absent(nobody_for=attempts.DESERTED + 1, began=False)
    driver._watch()
    assert not cluster.ended
    driver.channel.absent.remote = lambda: Absent(nobody_for=attempts.UNMET + 1, began=False)
    driver._watch()
    assert cluster.ended
    driver._failed(RayActorError())
    assert driver.progress.told == ["some workers did not come: starting others"]


def test_a_training_whose_place_is_kept_waits_for_no_room(cluster: Ray) -> None:
    """Processes that trials share may fill the cluster: nothing is free before the search ends, and its trials hung."""
    cluster.room = 0
    driver = attempts_of(cluster__max_failures=1)
    driver.channel.begin_anew = SimpleNamespace(remote=lambda workers, attempt: None)
    groups: list[WorkerGroup] = []

    def fit(group: WorkerGroup) -> TrainResult:
        groups.append(group)
        if len(groups) == 1:
            raise SharedBaseDied
        return TrainResult()

    again = Attempts(
        driver.spec, driver.build, driver.monitor, driver.stop, driver.worker, fit, changing=False, placed=True
    )
    assert again.run() == TrainResult()
    assert groups == [WorkerGroup(1, 1), WorkerGroup(1, 2)]
    assert again.cause == "the process of several trials died"


def test_a_stop_is_granted_where_no_worker_could_do_it(clock: Ray) -> None:
    driver = attempts_of()
    trains = False
    driver.channel.running = SimpleNamespace(remote=lambda: trains)
    driver._await_workers(2)
    driver.stop.asked = "SIGTERM"
    clock.now += attempts.NOBODY - 1
    driver._await_workers(2)
    trains = True  # the first group: it grants the stop after a step
    clock.now += 60
    driver._await_workers(2)
    trains = False
    driver._await_workers(2)
    clock.now += attempts.NOBODY
    with pytest.raises(Stopped) as caught:
        driver._await_workers(2)
    assert caught.value.exit_code == 143
    assert str(caught.value) == "stopped while no workers trained (SIGTERM); the same command continues from there"


def test_a_training_that_never_begins_can_be_stopped(clock: Ray) -> None:
    driver = attempts_of()
    driver.channel.running = SimpleNamespace(remote=lambda: False)
    driver.stop.asked = "SIGTERM"
    ends: list[bool] = []

    def ended(result: Any) -> bool:
        clock.now += 1
        assert clock.now < 1100, "nothing ends it"
        return False

    trainers: Any = SimpleNamespace(workers=2, failures=0, ended=ended, end=lambda at_once: ends.append(at_once))
    driver._trainers = trainers
    with pytest.raises(Stopped):
        driver._follow(trainers)
    assert ends == [True]


def test_what_the_first_workers_wait_for_is_said_once(clock: Ray) -> None:
    driver = attempts_of()
    driver.channel.running = SimpleNamespace(remote=lambda: False)
    for _ in range(4):
        driver._await_workers(2)
        clock.now += attempts.SLOW / 2
    assert driver.progress.told == ["waiting for 2 workers to start: there is room for 1 more"]
    driver._running = True  # who is lost later is replaced by Ray, or missed by _watch
    clock.now += 1000
    driver._await_workers(2)
    assert len(driver.progress.told) == 1


def test_workers_that_do_not_change_are_waited_for_until_a_stop_is_asked_for(clock: Ray) -> None:
    """Of GPUs, of which one is lost: Ray waits for it without end, and nobody was left who heard of the stop."""
    driver = attempts_of()
    driver.changing = False  # their channel has no membership to ask
    for _ in range(3):
        driver._await_workers(2)
        clock.now += attempts.SLOW / 2
    assert driver.progress.told == ["waiting for 2 workers to load the model, or to start: there is room for 1 more"]
    driver._running = True
    driver.stop.asked = "SIGTERM"
    for _ in range(2):
        driver._await_workers(2)
        clock.now += 60
    driver._on_event(Failure("worker 1 died"))
    driver._await_workers(2)
    clock.now += attempts.NOBODY
    with pytest.raises(Stopped):
        driver._await_workers(2)
