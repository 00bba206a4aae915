"""Checkpoints appear whole or not at all, and the newest good one is found."""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from olora_ray.adapter.factors import AdapterWeights, Factors
from olora_ray.common.errors import UserError
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.checkpoints import CheckpointManager
from olora_ray.train.state import TrainState
from tests.said import said


def writer(step: int, numbers: int = 5) -> Callable[[Path], None]:
    """Writes a small checkpoint that can be told from others."""
    weights = AdapterWeights(
        Factors(torch.ones(2, numbers), torch.ones(3, 2)), torch.ones(2, numbers), torch.ones(3, 2)
    )
    optimizer = {"a": torch.full((4,), float(step))}
    return lambda folder: checkpoint.save(folder, {"q": weights}, None, optimizer, TrainState(step), {"base": "b"}, "")


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


def test_the_newest_checkpoint_comes_back(place: str) -> None:
    assert checkpoints.latest_good(place) is None
    filled(place, 0, 2, 10)
    found = checkpoints.latest_good(place)
    assert found is not None
    assert found[0].endswith("step-0000010")
    assert found[1].state.step == 10


def test_the_time_of_each_checkpoint_is_told(place: str) -> None:
    told: list[tuple[int, float]] = []
    found = CheckpointManager(place, 9, saved=lambda step, seconds: told.append((step, seconds)))
    found.save(0, writer(0))
    found.save(2, writer(2))
    found.finish()
    assert [step for step, _ in told] == [0, 2]
    assert all(seconds > 0 for _, seconds in told)


def test_old_ones_go_only_after_a_new_one_is_there(place: str) -> None:
    filled(place, 0, 2, 4, keep=2)
    assert checkpoints.names(place) == ["step-0000002", "step-0000004"]


def test_one_that_is_damaged_is_passed_over_with_a_warning(place: str, tmp_path: Path) -> None:
    filled(place, 2, 4)
    (tmp_path / "checkpoints" / "step-0000004" / "optimizer.safetensors").write_bytes(b"")
    with said() as lines:
        found = checkpoints.latest_good(place)
    assert found is not None
    assert found[1].state.step == 2
    (line,) = lines
    assert line.startswith("warning: step-0000004 is passed over: ")
    assert "optimizer.safetensors" in line


def test_a_damaged_one_is_replaced_when_its_step_comes_again(place: str, tmp_path: Path) -> None:
    filled(place, 2, 4)
    (tmp_path / "checkpoints" / "step-0000004" / "manifest.json").write_text("{")
    filled(place, 4)
    found = checkpoints.latest_good(place)
    assert found is not None
    assert found[1].state.step == 4


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


def test_training_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    go_on = threading.Event()
    found = CheckpointManager(str(tmp_path), 2)
    found.save(2, lambda folder: (go_on.wait(10), writer(2)(folder))[1])
    go_on.set()  # reached although nothing is written yet
    found.finish()
    assert checkpoints.names(str(tmp_path)) == ["step-0000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 200 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_tried_again_then_told_and_the_good_one_stays(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PAUSES", (0.01, 0.01))
    filled(str(small_disk), 2)
    found = CheckpointManager(str(small_disk), 1)
    with said() as lines:
        found.save(4, writer(4, numbers=20_000))
        with pytest.raises(UserError, match=r"run\.storage: the last checkpoint cannot be written .*: .*[Nn]o space"):
            found.finish()
    assert [line.startswith("warning: the checkpoint of step 4 is tried again: ") for line in lines[:2]] == [True] * 2
    assert "given up after 3 attempts; training continues, the last one is step-0000002" in lines[2]
    assert [path.name for path in small_disk.iterdir()] == ["step-0000002"]
    newest = checkpoints.latest_good(str(small_disk))
    assert newest is not None


def test_room_that_comes_back_in_time_is_used(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PAUSES", (0.2, 0.2, 0.2, 0.2))
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 190_000)
    found = CheckpointManager(str(small_disk), 1)
    with said(lambda line: ballast.unlink(missing_ok=True)) as lines:
        found.save(4, writer(4, numbers=2000))
        found.finish()
    assert len(lines) == 1
    assert checkpoints.names(str(small_disk)) == ["step-0000004"]


def test_a_bug_while_writing_is_raised_in_the_thread_that_trains(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise KeyError("ours")

    found = CheckpointManager(str(tmp_path), 2)
    found.save(2, broken)
    with pytest.raises(KeyError, match="ours"):
        found.save(4, writer(4))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_damaged_the_newest_good_one_is_found(tmp_path: Path, data: st.DataObject) -> None:
    place = tmp_path / "fuzz"
    shutil.rmtree(place, ignore_errors=True)
    filled(str(place), 2, 4, 6)
    broken = data.draw(st.sets(st.sampled_from([2, 4, 6])))
    for step in broken:
        folder = place / checkpoints.name_of(step)
        file = folder / data.draw(st.sampled_from(sorted(os.listdir(folder))))
        content = bytearray(file.read_bytes())
        if content and data.draw(st.booleans()):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        else:
            content = content[: data.draw(st.integers(0, max(0, len(content) - 1)))]
        file.write_bytes(bytes(content))
    found = checkpoints.latest_good(str(place))
    # A flipped byte of a manifest can be a blank: then the checkpoint is still good.
    assert (found[1].state.step if found else None) in [*broken, max({2, 4, 6} - broken, default=None)]
    if found:
        assert torch.equal(found[1].optimizer["a"], torch.full((4,), float(found[1].state.step)))
