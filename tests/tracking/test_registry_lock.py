"""The lock of a registered model, on a real MLflow: one at a time, dead holders are passed over, live ones are not."""

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import TryAgain, UserError
from olora_ray.tracking import aliases
from olora_ray.tracking.client import connect
from tests import mlflow_database


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = connect(f"sqlite:///{mlflow_database.place(tmp_path_factory.mktemp('lock'))}/mlflow.db")
    found.create_registered_model("m")
    return found


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs with the looks at it."""
    clock = itertools.count(step=5)
    monkeypatch.setattr(aliases, "now", lambda: float(next(clock)))
    monkeypatch.setattr(aliases, "pause", lambda: None)


def tags(client: Any) -> dict[str, str]:
    return dict(client.get_registered_model("m").tags)


def foreign(client: Any, tag: str = "1.0", **owner: Any) -> str:
    """The tag of another process."""
    text = json.dumps({"host": "other", "machine": "another", "pid": 7, "since": "yesterday", **owner})
    client.set_registered_model_tag("m", f"{aliases.LOCK}{tag}", text)
    return f"{aliases.LOCK}{tag}"


def test_one_at_a_time_and_nothing_is_left(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "pause", lambda: time.sleep(0.001))
    inside, most, done = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, done
        for _ in range(3):
            with aliases.held(client, "m") as lock:
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


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("older", [True, False])
def test_a_live_holder_is_waited_for_and_a_silent_one_is_passed_over(
    client: Any, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = foreign(client, "1.0" if older else "9999999999.0")
    with monkeypatch.context() as patch:
        patch.setattr(aliases, "STALE", 1e9)
        with pytest.raises(TryAgain, match="are being moved by process 7 on other, since yesterday"):
            aliases.RegistryLock(client, "m").take()
    assert list(tags(client)) == [tag], "its own tag is taken away"
    with aliases.held(client, "m"):
        assert tag not in tags(client)
    assert tags(client) == {}


def test_the_tag_of_a_process_of_this_machine_that_has_ended_is_removed_at_once(client: Any) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    foreign(client, machine=aliases._machine(), pid=ended.pid)
    began = aliases.now()
    with aliases.held(client, "m"):
        assert aliases.now() - began < aliases.STALE
    assert tags(client) == {}


def test_a_number_that_is_no_process_has_not_ended() -> None:
    for pid in (1e300, 10**30):
        assert not aliases._has_ended(json.dumps({"machine": aliases._machine(), "pid": pid}))


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("text", ["", "{", "null", "7", '{"machine": 1}'])
def test_a_tag_that_says_nothing_counts_like_any_other(client: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client.set_registered_model_tag("m", f"{aliases.LOCK}1", text)
    with monkeypatch.context() as patch:
        patch.setattr(aliases, "STALE", 1e9)
        with pytest.raises(TryAgain, match="moved by somebody else"):
            aliases.RegistryLock(client, "m").take()
    with aliases.held(client, "m"):
        assert len(tags(client)) == 1


def test_one_that_was_taken_for_dead_does_not_go_on(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with aliases.held(client, "m") as lock:
        lock.check()
        monkeypatch.setattr(aliases, "LEASE", 0.0)
        with pytest.raises(TryAgain, match="MLflow is too slow"):
            lock.check()
    assert tags(client) == {}


def test_a_model_that_is_not_there(client: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model 'nothing' is registered"), aliases.held(client, "nothing"):
        pass
