"""Checkpoints are complete or invisible, and the newest good one is found."""

import errno
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.common import retry, storage
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.checkpoints import CheckpointManager
from tests.s3_server import Faults, Server
from tests.said import said


def writer(step: int, numbers: int = 5) -> Callable[[Path], None]:
    """Return a function that writes a small checkpoint with recognisable numbers."""
    weights = AdapterWeights(
        Factors(torch.ones(2, numbers), torch.ones(3, 2)), torch.ones(2, numbers), torch.ones(3, 2)
    )
    optimizer = {"a": torch.full((4,), float(step))}
    return lambda folder: checkpoint.save(
        folder, {"q": weights}, None, optimizer, TrainState(step), {"base": "b"}, ""
    )


def filled(place: str, *steps: int, keep: int = 9) -> CheckpointManager:
    found = CheckpointManager(place, keep)
    for step in steps:
        found.save(step, writer(step))
    found.finish()
    return found


@pytest.fixture(params=["folder", "uri"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder for checkpoints, as a path and as a URI."""
    folder = tmp_path / "checkpoints"
    return str(folder) if request.param == "folder" else folder.as_uri()


def newest(place: str) -> int:
    """The step of the newest good one, which is read whole."""
    found = checkpoints.latest_good(place)
    uri, read = found
    assert uri == storage.join(place, checkpoints.name_of(read.state.step))
    assert torch.equal(read.optimizer["a"], torch.full((4,), float(read.state.step)))
    return read.state.step


def is_good(place: str, step: int) -> bool:
    try:
        return checkpoints.read(storage.join(place, checkpoints.name_of(step))).state.step == step
    except UserError:
        return False


def cut(place: str, step: int) -> None:
    """Take the last byte of a file away."""
    file = storage.join(place, checkpoints.name_of(step), "optimizer.safetensors")
    storage.write_bytes(file, storage.read_bytes(file)[:-1])


def cut_off(place: str, step: int) -> None:
    """Take the manifest away, as after an upload that was cut off."""
    storage.remove(storage.join(place, checkpoints.name_of(step), "manifest.json"))


def test_the_newest_checkpoint_comes_back(place: str) -> None:
    assert checkpoints.latest_good(place) is None
    filled(place, 0, 2, 10)
    assert newest(place) == 10


def test_old_ones_go_only_after_a_new_one_is_there(place: str) -> None:
    filled(place, 0, 2, 4, keep=2)
    assert checkpoints.names(place) == ["step-0000002", "step-0000004"]


def test_one_that_is_damaged_is_passed_over_with_a_warning(place: str, tmp_path: Path) -> None:
    filled(place, 2, 4)
    (tmp_path / "checkpoints" / "step-0000004" / "optimizer.safetensors").write_bytes(b"")
    with said() as lines:
        assert newest(place) == 2
    (line,) = lines
    assert line.startswith("warning: step-0000004 is skipped: ")
    assert "optimizer.safetensors" in line


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "adapter.safetensors"])
@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.ESTALE, TryAgain), (errno.EACCES, checkpoints.Closed), (errno.EIO, TryAgain)],
)
def test_one_that_a_mounted_folder_does_not_give_now_is_not_passed_over(
    name: str, number: int, raised: type[UserError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint may be good, as with an object store."""
    place = str(tmp_path)
    filled(place, 2, 4)
    old = Path.open

    def opened(self: Path, *arguments: Any, **named: Any) -> Any:
        if self.match(f"step-0000004/{name}"):
            raise OSError(number, os.strerror(number))
        return old(self, *arguments, **named)

    def read_bytes(location: str) -> bytes:
        with Path(location).open("rb") as file:
            return bytes(file.read())

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    with pytest.raises(
        raised, match=f"step-0000004: cannot be read: {os.strerror(number)}"
    ) as caught:
        checkpoints.latest_good(place)
    assert caught.value.exit_code == raised.exit_code
    filled(place, 3, keep=1)  # nor is it removed, or keeps those before it from being removed
    assert checkpoints.names(place) == ["step-0000003", "step-0000004"]


def test_a_damaged_one_is_replaced_when_its_step_comes_again(place: str, tmp_path: Path) -> None:
    filled(place, 2, 4)
    (tmp_path / "checkpoints" / "step-0000004" / "manifest.json").write_text("{")
    filled(place, 4)
    assert newest(place) == 4


def test_what_a_killed_process_left_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    filled(str(tmp_path), 2)
    shutil.copytree(tmp_path / "step-0000002", tmp_path / ".step-0000004.abc.tmp")
    assert checkpoints.names(str(tmp_path)) == ["step-0000002"]
    CheckpointManager(str(tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000002"]


def test_nothing_has_the_name_of_a_checkpoint_while_it_is_written(tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        writer(4)(folder)
        reached.set()
        assert go_on.wait(10)

    found = filled(str(tmp_path), 2)
    found.save(4, slow)
    assert reached.wait(10)
    assert checkpoints.names(str(tmp_path)) == ["step-0000002"]
    go_on.set()
    found.finish()
    assert checkpoints.names(str(tmp_path)) == ["step-0000002", "step-0000004"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 200 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_the_good_one_stays(small_disk: Path) -> None:
    filled(str(small_disk), 2)
    found = CheckpointManager(str(small_disk), 1)
    with said() as lines:
        found.save(4, writer(4, numbers=20_000))
        with pytest.raises(
            UserError,
            match=r"run\.storage: the last checkpoint cannot be written .*: .*[Nn]o space",
        ):
            found.finish()
    assert re.search(r"step 4 cannot be written .*; training continues", lines[0])
    assert [path.name for path in small_disk.iterdir()] == ["step-0000002"]
    assert newest(str(small_disk)) == 2


def test_a_bug_while_writing_is_raised_in_the_thread_that_trains(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise KeyError("ours")

    found = CheckpointManager(str(tmp_path), 2)
    found.save(2, broken)
    with pytest.raises(KeyError, match="ours"):
        found.save(4, writer(4))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_one_displaces_no_good_one(place: str, keep: int) -> None:
    """K1: the newest checkpoint, 39, is damaged; the next attempt starts at 20 and saves 30."""
    filled(place, 20, 39)
    cut(place, 39)
    filled(place, 30, keep=keep)
    assert checkpoints.names(place)[:-1] == ["step-0000020", "step-0000030"][-keep:]
    assert newest(place) == 30


def slow(go_on: threading.Event, step: int) -> Callable[[Path], None]:
    """Write a checkpoint while the event is set."""

    def write(folder: Path) -> None:
        assert go_on.wait(30)
        writer(step)(folder)

    return write


@pytest.mark.parametrize("half", [False, True])
def test_who_was_given_up_and_comes_back_leaves_those_of_its_successor(
    place: str, half: bool
) -> None:
    """The first process hung while writing step 20; its successor has written 30 and is writing 40."""
    go_on = threading.Event()
    mine = filled(place, 0, 10, keep=2)
    mine.save(20, slow(go_on, 20))
    filled(place, 30, 40, keep=9)
    if half:  # as what is being uploaded
        cut_off(place, 40)
    go_on.set()
    mine.finish()
    assert [step in checkpoints.steps_of(place) for step in (0, 10, 20, 30, 40)] == [
        False,
        True,
        True,
        True,
        True,
    ]
    assert is_good(place, 30)


class TestObjectStore:
    @pytest.fixture
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(retry, "PATIENCE", 0.0)

    @pytest.fixture
    def place(self, bucket: str, temporary: Path) -> Iterator[str]:
        yield f"{bucket}/r1/checkpoints"
        assert list(temporary.iterdir()) == []

    def test_the_newest_comes_back_and_old_ones_go(self, s3_server: Server, place: str) -> None:
        filled(place, 0, 2, 4, keep=2)
        assert newest(place) == 4
        assert {key.split("/")[0] for key in s3_server.keys(place)} == {
            "step-0000002",
            "step-0000004",
        }

    def test_an_upload_that_was_cut_is_not_counted_and_is_swept(
        self, s3_server: Server, place: str
    ) -> None:
        filled(place, 2, 4, 6)
        cut_off(place, 6)
        with said() as lines:
            assert newest(place) == 4
        assert lines == []
        assert checkpoints.names(place) == ["step-0000002", "step-0000004"]
        CheckpointManager(place, 2)
        assert {key.split("/")[0] for key in s3_server.keys(place)} == {
            "step-0000002",
            "step-0000004",
        }

    @pytest.mark.usefixtures("impatient")
    def test_what_does_not_arrive_now_is_not_passed_over(
        self, s3_server: Server, place: str
    ) -> None:
        """Otherwise a restart during a bad minute of the object store would begin at an earlier step, or at step 0."""
        filled(place, 2, 4)
        s3_server.faults = Faults(
            matches=lambda method, path: path.endswith("step-0000004/adapter.safetensors"),
            refuse=-1,
        )
        with pytest.raises(TryAgain, match=r"step-0000004: cannot be read: .*503"):
            checkpoints.latest_good(place)

    def test_a_store_that_is_away_for_a_while_gets_it_in_the_end(
        self, s3_server: Server, place: str
    ) -> None:
        found = filled(place, 2)
        s3_server.faults = Faults(refuse=2 * retry.ATTEMPTS)
        with said() as lines:
            found.save(4, writer(4))
            found.finish()
        assert lines
        assert all("does not answer" in line for line in lines)
        assert checkpoints.names(place) == ["step-0000002", "step-0000004"]

    @pytest.mark.usefixtures("impatient")
    def test_one_that_stays_away_is_told_and_training_continues(
        self, s3_server: Server, place: str
    ) -> None:
        found = filled(place, 2)
        s3_server.faults = Faults(refuse=-1)
        with said() as lines:
            found.save(4, writer(4))
            with pytest.raises(
                TryAgain, match=r"run\.storage: the last checkpoint cannot be written"
            ):
                found.finish()
        assert re.search(r"step 4 cannot be written .*; training continues", lines[-1])
        s3_server.faults = Faults()
        assert checkpoints.names(place) == ["step-0000002"]
