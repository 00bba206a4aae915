"""The lock of a registered model, on a real MLflow: one holder at a time; dead holders lose it, live ones do not."""

import itertools
import random
import threading
import time
from typing import Any

import pytest

from olora_ray.common.errors import TryAgain, UserError
from olora_ray.tracking.aliases import LEASE, LOCK, STALE, RegistryLock, held
from olora_ray.tracking.client import connect
from tests import mlflow_database


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = connect(f"sqlite:///{mlflow_database.place(tmp_path_factory.mktemp('lock'))}/mlflow.db")
    found.create_registered_model("m")
    return found


def tags(client: Any) -> dict[str, str]:
    return dict(client.get_registered_model("m").tags)


class Clocked(RegistryLock):
    """A lock whose clock advances with each look."""

    def __init__(self, client: Any) -> None:
        super().__init__(client, "m")
        self.clock = itertools.count(step=5.0)

    def now(self) -> float:
        return next(self.clock)

    def pause(self) -> None:
        pass


class Other(Clocked):
    """The same, while another process takes and releases the lock all the time."""

    tag = ""

    def pause(self) -> None:
        if self.tag:
            self.client.delete_registered_model_tag("m", self.tag)
        self.tag = f"{LOCK}{next(self.clock)}"
        self.client.set_registered_model_tag("m", self.tag, "process 7 on other, since yesterday")


def test_one_at_a_time_and_nothing_is_left(client: Any) -> None:
    inside, most, done = 0, 0, 0

    class Quick(RegistryLock):
        def pause(self) -> None:
            time.sleep(random.uniform(0.0, 0.03))

    def work() -> None:
        nonlocal inside, most, done
        for _ in range(3):
            with held(Quick(client, "m")) as lock:
                inside += 1
                most = max(most, inside)
                time.sleep(0.003)
                lock.check()
                inside -= 1
                done += 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, done) == (1, 9)
    assert tags(client) == {}


@pytest.mark.parametrize("text", ["process 7 on other, since yesterday", ""])
def test_a_silent_holder_is_passed_over(client: Any, text: str) -> None:
    client.set_registered_model_tag("m", f"{LOCK}1", text)
    lock = Clocked(client)
    with held(lock):
        assert next(lock.clock) > STALE
        assert len(tags(client)) == 1
    assert tags(client) == {}


def test_live_holders_are_waited_for(client: Any) -> None:
    lock = Other(client)
    lock.pause()
    with pytest.raises(TryAgain, match="are being moved by process 7 on other, since yesterday"):
        lock.take()
    assert list(tags(client)) == [lock.tag], "its own tag is taken away"
    client.delete_registered_model_tag("m", lock.tag)


def test_one_that_was_taken_for_dead_does_not_go_on(client: Any) -> None:
    lock = Clocked(client)
    with held(lock):
        lock.check()
        lock.clock = itertools.count(LEASE + 20.0)
        with pytest.raises(TryAgain, match="MLflow is too slow"):
            lock.check()
    assert tags(client) == {}


def test_a_model_that_is_not_there(client: Any) -> None:
    with (
        pytest.raises(UserError, match="no model 'nothing' is registered"),
        held(RegistryLock(client, "nothing")),
    ):
        pass
