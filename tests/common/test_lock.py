"""One at a time: refused while the holder lives, taken over when it is gone, told when it was lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common import lock, storage
from olora_ray.common.errors import TryAgain
from tests.waiting import until

HOLD = """
import sys, time
from olora_ray.common import lock
with lock.held(sys.argv[1], "the work"):
    print("held", flush=True)
    time.sleep(60)
"""
COUNT = """
import sys, time
from olora_ray.common import lock
place, counter = sys.argv[1:]
for _ in range(20):
    with lock.held(place, "the work", wait=60):
        number = int(open(counter).read())
        time.sleep(0.001)
        open(counter, "w").write(str(number + 1))
"""


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "locks" / "model.json")


def holder(place: str) -> subprocess.Popen[str]:
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def edit(place: str, **fields: Any) -> None:
    tree = json.loads(Path(place).read_text())
    storage.write_text(place, json.dumps({**tree, **fields}))


def test_a_second_one_is_refused_and_told_who_holds_it(place: str) -> None:
    held = rf"the work is already running \(process {os.getpid()} on "
    with lock.held(place, "the work"), pytest.raises(TryAgain, match=held) as caught, lock.held(place, "the work"):
        pass
    assert caught.value.exit_code == 75
    with lock.held(place, "the work"):
        pass
    assert not Path(place).exists()


def test_a_killed_holder_on_this_host_is_followed_at_once(place: str) -> None:
    with holder(place) as process:
        with pytest.raises(TryAgain, match=f"process {process.pid}"), lock.held(place, "the work"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock.held(place, "the work") as taken:
            taken.check()


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"processes": "pid:[1]"}])
def test_a_holder_elsewhere_is_followed_when_it_is_silent_for_too_long(place: str, other: dict[str, str]) -> None:
    with holder(place) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        edit(place, **other)
        with pytest.raises(TryAgain), lock.held(place, "the work"):
            pass
        edit(place, renewed=time.time() - lock.EXPIRES - 1)
        with lock.held(place, "the work"):
            pass


def test_a_held_lock_is_renewed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW", 0.05)
    with lock.held(place, "the work"):
        edit(place, renewed=0.0)
        until(lambda: json.loads(Path(place).read_text())["renewed"] > 0)


def test_who_has_lost_the_lock_learns_it_and_leaves_it_alone(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW", 0.05)
    with lock.held(place, "the work") as lost:
        edit(place, token="another")
        with pytest.raises(TryAgain, match="taken over"):
            lost.check()
        time.sleep(0.2)  # some renewals, which must write nothing
    assert json.loads(Path(place).read_text())["token"] == "another"


def test_a_lock_file_that_does_not_read_holds_nobody_up(place: str) -> None:
    Path(place).parent.mkdir()
    for text in ("", "{", "[]", '{"host": 1}'):
        Path(place).write_text(text)
        with lock.held(place, "the work"):
            pass


def test_one_at_a_time_among_processes(place: str, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [
        sys.executable,
        "-c",
        "from olora_ray.common import lock; lock.POLL = 0.01\n" + COUNT,
        place,
        str(counter),
    ]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert counter.read_text() == "60"


def test_the_look_and_the_write_are_one_step(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one that comes exactly between them waits, and then sees the first."""
    found: list[lock.Holder | None] = []
    first, second = lock.Lock(place, "first"), lock.Lock(place, "second")
    thread = threading.Thread(target=lambda: found.append(second.take()))
    read = lock._read

    def interrupted(where: str) -> lock.Holder | None:
        seen = read(where)
        if threading.current_thread() is not thread and not thread.ident:
            thread.start()
            thread.join(0.3)
        return seen

    monkeypatch.setattr(lock, "_read", interrupted)
    assert first.take() is None
    thread.join()
    assert [holder.token for holder in found if holder] == [first._mine.token]
    first.release()


def test_without_atomic_steps_the_one_who_stands_there_after_a_while_has_it(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store: two find it free and write; the one who was overwritten meanwhile gives way."""
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    uri = f"file://{place}"
    Path(place).parent.mkdir()
    second = lock.Lock(uri, "second")
    monkeypatch.setattr(time, "sleep", lambda _: second._write())
    first = lock.Lock(uri, "first").take()
    assert first is not None
    assert first.token == second._mine.token
    monkeypatch.undo()
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    Path(place).unlink()
    with lock.held(uri, "alone") as alone:
        alone.check()
