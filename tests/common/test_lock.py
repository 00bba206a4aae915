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
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common import lock, storage
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.common.lock import Seen
from tests.s3_server import Faults, Server, dead_port
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
    tree = json.loads(storage.read_text(place))
    storage.write_text(place, json.dumps({**tree, **fields}))


def silent(place: str) -> None:
    """Let the lock look as if it had not been renewed for long, by the storage's clock."""
    long_ago = time.time() - lock.EXPIRES - 1
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


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"processes": "pid:[1]"}, {"boot": "another"}, {"boot": ""}])
def test_a_holder_elsewhere_is_followed_when_it_is_silent_for_too_long(place: str, other: dict[str, str]) -> None:
    """Another host may have the same name, and its first namespace has the same id: the boot tells them apart."""
    with holder(place) as process:
        killed(process)
        edit(place, **other)
        with pytest.raises(TryAgain), lock.held(place, "the work"):
            pass
        silent(place)
        with lock.held(place, "the work"):
            pass


def test_a_lock_of_an_older_version_holds_until_it_is_silent(place: str) -> None:
    with holder(place) as process:
        killed(process)
        tree = json.loads(Path(place).read_text())
        del tree["boot"]
        Path(place).write_text(json.dumps(tree))
        with pytest.raises(TryAgain), lock.held(place, "the work"):
            pass
        silent(place)
        with lock.held(place, "the work"):
            pass


def test_a_clock_that_is_wrong_takes_no_lock_over(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(place) as process:
        edit(place, host="elsewhere")
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 10 * lock.EXPIRES)
        with pytest.raises(TryAgain), lock.held(place, "the work"):
            pass
        killed(process)


def test_a_held_lock_is_renewed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW", 0.05)
    with lock.held(place, "the work"):
        edit(place, renewed=0.0)
        silent(place)
        until(lambda: json.loads(Path(place).read_text())["renewed"] > 0)
        assert time.time() - Path(place).stat().st_mtime < lock.EXPIRES


def test_who_has_lost_the_lock_learns_it_and_leaves_it_alone(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW", 0.05)
    with lock.held(place, "the work") as lost:
        edit(place, token="another")
        with pytest.raises(TryAgain, match="taken over"):
            lost.check()
        time.sleep(0.2)  # some renewals, which must write nothing
    assert json.loads(Path(place).read_text())["token"] == "another"


def test_who_finds_the_lock_removed_learns_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW", 0.05)
    with lock.held(place, "the work") as lost:
        Path(place).unlink()
        with pytest.raises(TryAgain, match=r"its lock .* was removed, so another one may be running"):
            lost.check()
        time.sleep(0.2)  # some renewals, which must not bring it back
        assert not Path(place).exists()


def test_a_lock_file_that_does_not_read_holds_nobody_up(place: str) -> None:
    Path(place).parent.mkdir()
    for text in ("", "{", "[]", "null", "7", '{"host": 1}', '{"token": "a", "host": 1, "pid": "x"}', "\x00\xff"):
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
    read = lock.LocalFile.read

    def interrupted(file: lock.LocalFile) -> Seen:
        seen = read(file)
        if threading.current_thread() is not thread and not thread.ident:
            thread.start()
            thread.join(0.3)
        return seen

    monkeypatch.setattr(lock.LocalFile, "read", interrupted)
    assert first.take() is None
    thread.join()
    assert [holder.token for holder in found if holder] == [first._mine.token]
    first.release()


class TestRefused:
    def test_a_folder_in_its_place(self, place: str) -> None:
        Path(place).mkdir(parents=True)
        with (
            pytest.raises(UserError, match=r"the work: its lock .* is a folder; remove it"),
            lock.held(place, "the work"),
        ):
            pass

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        error = refused(str(tmp_path / "file" / "locks" / "a.json"))
        assert not isinstance(error, TryAgain)
        assert re.fullmatch(r"the work: its lock .*/a\.json cannot be written: Not a directory", str(error))

    @pytest.mark.parametrize("number", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
    def test_a_file_system_without_locks(self, place: str, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
        """As Lustre without -o flock; none can be mounted here."""

        def none(file: Any, operation: int) -> None:
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

        monkeypatch.setattr(fcntl, "flock", none)
        assert re.match(r"the work: the file system of .* has no file locks \(", str(refused(place)))


class TestObjectStore:
    @pytest.fixture
    def server(self, s3_server: Server) -> Server:
        return s3_server

    @pytest.fixture
    def place(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setattr(lock, "POLL", 0.05)
        monkeypatch.setattr(lock, "SETTLE", 2.0)
        monkeypatch.setattr(lock, "WRITE_LIMIT", 1.5)
        return f"{bucket}/locks/model.json"

    def test_a_second_one_is_refused_and_the_next_one_taken(self, place: str) -> None:
        with lock.held(place, "the work") as first:
            assert f"already running (process {os.getpid()} on " in str(refused(place))
            first.check()
        with lock.held(place, "the work") as second:
            second.check()

    @pytest.mark.parametrize("conditions", [True, False])
    def test_of_two_that_find_it_free_one_has_it(
        self, server: Server, place: str, conditions: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both have looked before either writes; a store that ignores conditions settles it by waiting."""
        server.faults = Faults(ignore_conditions=not conditions)
        both, read = threading.Barrier(2), lock.ConditionalFile.read
        seen: set[int] = set()

        def together(file: lock.ConditionalFile) -> Seen:
            found = read(file)
            if id(file) not in seen:
                seen.add(id(file))
                both.wait(10)
            return found

        monkeypatch.setattr(lock.ConditionalFile, "read", together)
        locks = [lock.Lock(place, "the work") for _ in range(2)]
        results: list[lock.Holder | None] = []
        threads = [threading.Thread(target=lambda each=each: results.append(each.take())) for each in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(found is None for found in results) == [False, True]
        (winner,) = (each for each in locks if each._thread.is_alive())
        winner.check()
        winner.release()

    def test_a_writer_that_pauses_between_look_and_write_takes_nothing(
        self, server: Server, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """K2: the second looks, pauses longer than the first one needs to take the lock, and writes."""
        server.faults = Faults(ignore_conditions=True)
        second, write = lock.Lock(place, "second"), lock.ConditionalFile.write

        def late(file: lock.ConditionalFile, content: bytes, seen: Seen) -> bool:
            if file is second._file and lock._holder(seen) is None and not first._thread.is_alive():
                assert first.take() is None
            return write(file, content, seen)

        first = lock.Lock(place, "first")
        monkeypatch.setattr(lock.ConditionalFile, "write", late)
        with pytest.raises(TryAgain, match=r"too long to be sure of it"):
            second.take()
        with pytest.raises(TryAgain):  # the other's write has destroyed it: it knows, and nobody else holds it
            first.check()
        first.release()

    def test_a_silent_holder_is_followed_by_one_of_many(
        self, server: Server, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with lock.held(place, "the work"):
            edit(place, host="elsewhere", token="silent")
            with pytest.raises(TryAgain), lock.held(place, "the work"):
                pass
            monkeypatch.setattr(lock, "EXPIRES", -1.0)
            locks = [lock.Lock(place, "the work") for _ in range(4)]
            monkeypatch.setattr(lock.Lock, "_keep", lambda self: None)
            for each in locks:
                each._file.read()
            seen = locks[0]._file.read()
            written = [each._file.write(each._content(), seen) for each in locks]
            assert written == [True, False, False, False]

    def test_a_renewed_lock_stays_and_a_removed_one_is_noticed(
        self, server: Server, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lock, "RENEW", 0.05)
        with lock.held(place, "the work") as mine:
            before = storage.read_text(place)
            until(lambda: storage.read_text(place) != before)
            mine.check()
            storage.remove(place)
            with pytest.raises(TryAgain, match="was removed"):
                mine.check()
        assert not storage.exists(place)

    def test_a_dead_store_is_told_in_one_line(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{dead_port()}")
        error = refused(place)
        assert isinstance(error, TryAgain)
        assert re.match(r"the work: its lock s3://.* cannot be written: Could not connect", str(error))

    def test_a_bucket_that_is_not_there(self, place: str) -> None:
        assert "the work: its lock s3://none/a cannot be written: there is no bucket" in str(refused("s3://none/a"))

    def test_a_renewal_that_fails_is_told(self, server: Server, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lock, "RENEW", 0.05)
        with said() as lines, lock.held(place, "the work") as mine:
            server.faults = Faults(refuse=-1)
            until(lambda: lines)
            server.faults = Faults()
            mine.check()
        assert lines[0].startswith("warning: the work: the lock cannot be renewed: SlowDown (HTTP 503)")


class TestOtherStores:
    def test_the_one_who_stands_there_after_a_while_has_it(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A store of which only writing and reading is known."""
        monkeypatch.setattr(lock, "SETTLE", 0.01)
        Path(place).parent.mkdir()
        first, second = lock.SettlingFile(place), lock.SettlingFile(place)
        seen = first.read()
        assert second.read().content is None
        assert first.write(b"first", seen)
        assert second.write(b"second", seen)
        assert second.stands(b"second")
        assert not first.stands(b"first")
        second.clear(second.read())
        assert second.read().content is None

    def test_the_clock_of_a_host_does_not_matter(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A host that is ahead would take the lock of one that lives, one that is behind would never take any."""
        Path(place).parent.mkdir()
        lock.SettlingFile(place).write(b"first", Seen(None, 0.0, None))
        now = time.time
        for ahead in (10 * lock.EXPIRES, -10 * lock.EXPIRES):
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda ahead=ahead: now() + ahead)
                assert abs(lock.SettlingFile(place).read().age) < lock.EXPIRES / 2
        silent(place)
        assert lock.SettlingFile(place).read().age > lock.EXPIRES
        assert [file.name for file in Path(place).parent.iterdir()] == ["model.json"]
