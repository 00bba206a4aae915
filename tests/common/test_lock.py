"""One at a time: refused while the holder lives, taken over when it is gone, told when it was lost."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common import lock, storage
from olora_ray.common.errors import TryAgain, UserError
from tests.s3_server import Faults, Server
from tests.said import said
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
from olora_ray.common.errors import TryAgain
place, counter = sys.argv[1:]
left = 20
while left:
    try:
        with lock.held(place, "the work"):
            number = int(open(counter).read())
            time.sleep(0.001)
            open(counter, "w").write(str(number + 1))
            left -= 1
    except TryAgain:
        time.sleep(0.005)
"""


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "locks" / "model.json")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short times: what they are is not tested."""
    for name, seconds in (("RENEW", 0.05), ("SETTLE", 2.0)):
        monkeypatch.setattr(lock, name, seconds)


def holder(place: str) -> subprocess.Popen[str]:
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def edit(place: str, **fields: Any) -> None:
    tree = json.loads(storage.read_text(place))
    storage.write_text(place, json.dumps({**tree, **fields}))


def silent(place: str, now: float | None = None) -> None:
    """Let the lock look as if it had not been renewed for long, by the storage's clock."""
    long_ago = (now or time.time()) - lock.EXPIRES - 1
    os.utime(place, (long_ago, long_ago))


def refused(place: str) -> UserError:
    """What taking the lock raises."""
    with pytest.raises(UserError) as caught, lock.held(place, "the work"):
        pass
    assert "\n" not in str(caught.value)
    return caught.value


def killed(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_second_one_is_refused_and_told_who_holds_it(place: str) -> None:
    held = rf"the work is already running \(process {os.getpid()} on "
    with (
        lock.held(place, "the work"),
        pytest.raises(TryAgain, match=held) as caught,
        lock.held(place, "the work"),
    ):
        pass
    assert caught.value.exit_code == 75
    with lock.held(place, "the work"):
        pass
    assert not Path(place).exists()


def test_a_killed_holder_on_this_host_is_followed_at_once(place: str) -> None:
    with holder(place) as process:
        assert f"process {process.pid}" in str(refused(place))
        killed(process)
        with lock.held(place, "the work") as taken:
            taken.check()


@pytest.mark.parametrize("machine", ["another boot pid:[1]", ""])
def test_a_holder_elsewhere_is_followed_when_it_is_silent_for_too_long(
    place: str, machine: str
) -> None:
    """Another host may have the same name, and its first namespace has the same id: the boot tells them apart."""
    with holder(place) as process:
        killed(process)
        edit(place, machine=machine)
        refused(place)
        silent(place)
        with lock.held(place, "the work"):
            pass


@pytest.mark.usefixtures("hurried")
def test_a_held_lock_is_renewed(place: str) -> None:
    with lock.held(place, "the work"):
        edit(place, renewed=0.0)
        silent(place)
        until(lambda: json.loads(Path(place).read_text())["renewed"] > 0)
        assert time.time() - Path(place).stat().st_mtime < lock.EXPIRES


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("removed", [False, True])
def test_who_has_lost_the_lock_learns_it_and_leaves_it_alone(place: str, removed: bool) -> None:
    with lock.held(place, "the work") as lost:
        Path(place).unlink() if removed else edit(place, token="another")
        with pytest.raises(
            TryAgain,
            match=r"was removed, so another process may hold it" if removed else "taken over",
        ):
            lost.check()
        time.sleep(0.2)  # some renewals, which must write nothing
    assert storage.exists(place) is not removed
    assert removed or json.loads(Path(place).read_text())["token"] == "another"


def test_a_lock_file_that_does_not_read_holds_nobody_up(place: str) -> None:
    Path(place).parent.mkdir()
    for text in (
        "",
        "{",
        "[]",
        "null",
        "7",
        '{"host": 1}',
        '{"token": "a", "host": 1, "pid": "x"}',
        "\x00\xff",
    ):
        Path(place).write_text(text)
        with lock.held(place, "the work"):
            pass


def test_one_at_a_time_among_processes(place: str, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [
        subprocess.Popen([sys.executable, "-c", COUNT, place, str(counter)]) for _ in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert counter.read_text() == "60"


class Takers:
    """Threads that all take the same lock."""

    def __init__(self, locks: Sequence[lock.Lock]) -> None:
        self.locks = locks
        self.found: dict[int, lock.Holder | None] = {}
        self.threads = [
            threading.Thread(target=self._take, args=(number,)) for number in range(len(locks))
        ]
        for thread in self.threads:
            thread.start()

    def _take(self, number: int) -> None:
        self.found[number] = self.locks[number].take()

    def winner(self) -> lock.Lock:
        """The only one that has the lock, once all have looked."""
        for thread in self.threads:
            thread.join(30)
        assert len(self.found) == len(self.locks)
        (number,) = (number for number, holder in self.found.items() if holder is None)
        return self.locks[number]


class TestRefused:
    def test_a_folder_in_its_place(self, place: str) -> None:
        Path(place).mkdir(parents=True)
        assert re.match(r"the work: its lock .* is a folder; remove it", str(refused(place)))

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        error = refused(str(tmp_path / "file" / "locks" / "a.json"))
        assert not isinstance(error, TryAgain)
        assert re.fullmatch(
            r"the work: its lock .*/a\.json cannot be written: Not a directory", str(error)
        )

    def test_a_file_system_without_locks(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """As Lustre without -o flock; none can be mounted here."""

        def none(file: Any, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", none)
        assert re.match(
            r"the work: the file system of .* has no file locks \(", str(refused(place))
        )


@pytest.mark.usefixtures("hurried")
class TestObjectStore:
    @pytest.fixture
    def place(self, bucket: str) -> str:
        return f"{bucket}/locks/model.json"

    @pytest.mark.parametrize("ignored", [False, True])
    def test_of_two_that_find_it_free_one_has_it(
        self, s3_server: Server, place: str, ignored: bool
    ) -> None:
        """Both have looked before either writes; a store that ignores conditions settles it by waiting."""
        s3_server.faults = Faults(
            ignore_conditions=ignored, matches=first_looks(2, threading.Barrier(2))
        )
        winner = Takers([lock.Lock(place, "the work") for _ in range(2)]).winner()
        winner.check()
        winner.release()

    def test_a_writer_that_pauses_between_look_and_write_takes_nothing(
        self, s3_server: Server, place: str
    ) -> None:
        """The second looks, pauses longer than the first one needs to take the lock, and writes."""
        first, second = lock.Lock(place, "first"), lock.Lock(place, "second")
        looked: list[str] = []

        def pauses(method: str, path: str) -> bool:
            if method == "PUT" and path.endswith("model.json") and not looked:
                looked.append(path)
                assert first.take() is None
            return True

        s3_server.faults = Faults(ignore_conditions=True, matches=pauses)
        with pytest.raises(TryAgain, match=r"too slow for a safe lock"):
            second.take()
        with pytest.raises(
            TryAgain
        ):  # the other's write has destroyed it: it knows, and nobody else holds it
            first.check()
        first.release()

    def test_a_renewed_lock_stays_and_a_removed_one_is_noticed(self, place: str) -> None:
        with lock.held(place, "the work") as mine:
            before = storage.read_text(place)
            until(lambda: storage.read_text(place) != before)
            mine.check()
            storage.remove(place)
            with pytest.raises(TryAgain, match="was removed"):
                mine.check()
        assert not storage.exists(place)

    def test_a_renewal_that_fails_is_told(self, s3_server: Server, place: str) -> None:
        with said() as lines, lock.held(place, "the work") as mine:
            s3_server.faults = Faults(refuse=-1)
            until(lambda: lines)
            s3_server.faults = Faults()
            mine.check()
        assert lines[0].startswith(
            "warning: the work: the lock cannot be renewed: SlowDown (HTTP 503)"
        )


def first_looks(count: int, barrier: threading.Barrier) -> Callable[[str, str], bool]:
    """Let the first `count` looks at a lock wait for each other."""
    looks = iter(range(count))

    def matches(method: str, path: str) -> bool:
        if method == "GET" and path.endswith("model.json") and next(looks, None) is not None:
            barrier.wait(10)
        return True

    return matches


class TestOtherStores:
    def test_the_clock_of_a_host_does_not_matter(
        self, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A host that is ahead would take the lock of one that lives, one that is behind would never take any."""
        with holder(place) as process:
            edit(place, machine="another")
            now = time.time()
            for ahead in (10 * lock.EXPIRES, -10 * lock.EXPIRES):
                monkeypatch.setattr(time, "time", lambda ahead=ahead: now + ahead)
                refused(place)
            silent(place, now)
            with lock.held(place, "the work"):
                pass
            killed(process)
        assert sorted(file.name for file in Path(place).parent.iterdir()) == ["model.json.guard"]
