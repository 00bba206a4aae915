"""Ray starts beside the block, in a thread that lives as long as Ray does."""

import os
import signal
import subprocess
import threading
import time

import pytest
from ray._private.utils import set_kill_on_parent_death_linux

from olora_ray.cluster import address
from olora_ray.common.errors import Stopped
from olora_ray.pipeline import connection
from olora_ray.pipeline.early_ray import starting


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "ray"]


def test_the_block_goes_on_while_ray_starts() -> None:
    here = threading.Event()

    def waits() -> None:
        if not here.wait(20):
            raise TimeoutError

    with starting(waits) as start:
        here.set()
        start.join()
    assert threads() == []


def test_processes_of_ray_live_as_long_as_the_block() -> None:
    begun: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        begun.append(subprocess.Popen(["sleep", "60"], preexec_fn=set_kill_on_parent_death_linux))

    with starting(start) as ray_start:
        ray_start.join()
        time.sleep(0.3)
        assert begun[0].poll() is None
    assert begun[0].wait(10) == -signal.SIGKILL


def test_what_keeps_ray_from_starting_is_told_where_it_is_waited_for() -> None:
    def fails() -> None:
        raise OSError("no room for the object store")

    with pytest.raises(OSError, match="no room"), starting(fails) as start:
        start.join()
    with starting(fails):
        pass  # nobody has waited
    assert threads() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_ray_is_there_ends_the_block(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)

    def killed() -> None:
        with starting(lambda: time.sleep(0.5)):
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(Stopped, match=number.name) as caught:
        killed()
    assert caught.value.exit_code == code
    assert threads() == []
    assert signal.getsignal(number) is before


def test_a_ray_that_is_there_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "find", lambda: "10.0.0.1:6379")
    with connection.begun() as start:
        assert start is None


def test_a_ray_of_the_runs_own_starts_no_process_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    name = "RAY_prestart_worker_first_driver"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(connection.token, "make_own", lambda: None)
    monkeypatch.setattr(connection.ray, "init", lambda **named: told.append(os.environ[name]))
    connection._init(address.OWN)
    assert told == ["0"]
    monkeypatch.setenv(name, "1")  # by whoever started this
    connection._init(address.OWN)
    assert told == ["0", "1"]
