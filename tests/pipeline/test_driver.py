"""One driver a run: the second leaves or waits, and one that has lost its run stops at once."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from olora_ray.common import storage
from olora_ray.common.errors import TakenOver, TryAgain
from olora_ray.common.lock import Seen
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.pipeline import run
from olora_ray.pipeline.connection import Stop
from olora_ray.pipeline.run import only_driver
from tests import tiny
from tests.waiting import until


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny.config(run__name="mine", run__storage=str(tmp_path / "runs"))


def take_over(config: Config) -> None:
    """As another process does once this one was silent for too long."""
    place = Path(config.run.storage) / "locks" / "runs" / f"{config.run.name}.json"
    storage.write_text(str(place), json.dumps({**json.loads(place.read_text()), "token": "another"}))


def test_the_longest_name_of_a_run_has_room_for_its_lock(config: Config) -> None:
    longest = override(config, {"run.name": "n" * 200})
    with only_driver(longest), pytest.raises(TryAgain), only_driver(longest):
        pass


def test_a_second_driver_leaves_and_says_who_works_on_the_run(config: Config) -> None:
    with only_driver(config), pytest.raises(TryAgain) as caught, only_driver(config):
        pass
    assert caught.value.exit_code == 75
    assert str(caught.value).startswith(f"run.name: 'mine' is already running (process {os.getpid()} on ")
    assert ", since 20" in str(caught.value)
    assert "choose another run.name, or set run.wait to wait for it" in str(caught.value)
    with only_driver(config), only_driver(override(config, {"run.name": "another"})):
        pass


def test_a_second_driver_waits_if_it_is_asked_to(config: Config) -> None:
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with only_driver(config):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(30)
    threading.Timer(0.3, leave.set).start()
    with only_driver(override(config, {"run.wait": 60.0})):
        assert leave.is_set()
    thread.join()


def test_a_second_command_does_nothing_but_say_so(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "check_tracking", lambda config, folder: None)
    monkeypatch.setattr(run.address, "find", lambda: "local")
    monkeypatch.setattr(run, "open_base", lambda config: pytest.fail("the model is opened"))
    with only_driver(config), pytest.raises(TryAgain, match="is already running"):
        run.run(config)


def test_who_waited_for_the_run_reports_it_and_does_not_do_it_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finished_meanwhile() -> str:
        folder = run.RunFolder(config)
        folder.claim()
        folder.write_result({"metrics": {"eval/loss": 0.5}})
        return "local"

    monkeypatch.setattr(run, "check_tracking", lambda config, folder: None)
    monkeypatch.setattr(run.address, "find", finished_meanwhile)
    monkeypatch.setattr(run, "open_base", lambda config: pytest.fail("the model is opened"))
    assert run.run(config) == {"metrics": {"eval/loss": 0.5}}


def test_who_has_lost_the_run_learns_it(config: Config) -> None:
    with only_driver(config) as mine:
        mine.check()
        take_over(config)
        with pytest.raises(TakenOver, match=r"'mine' was taken over .*it goes on with the run") as caught:
            mine.check()
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("gentle", [False, True])
def test_who_has_lost_the_run_stops_at_once(config: Config, gentle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LOOK", 0.05)
    stop = Stop()
    stop.gentle = gentle  # even while a first signal would be a wish
    with only_driver(config) as mine:
        take_over(config)
        with pytest.raises(TakenOver) as caught, stop, mine.watch(stop):
            time.sleep(30)
    assert caught.value.exit_code == 75


def away(mine: run.Driver, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the storage of a run's lock not answer from now on; the looks at it."""
    looks: list[int] = []

    def read() -> Seen:
        looks.append(1)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(mine._lease._file, "read", read)
    return looks


def test_a_storage_that_does_not_answer_for_a_while_ends_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LOOK", 0.01)
    with only_driver(config) as mine, Stop() as stop:
        looks = away(mine, monkeypatch)
        with mine.watch(stop):
            until(lambda: len(looks) >= 3)


def test_nothing_is_done_twice_while_nobody_can_say_whose_the_run_is(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with only_driver(config) as mine:
        away(mine, monkeypatch)
        with pytest.raises(TakenOver) as caught:
            mine.check()
    assert caught.value.exit_code == 75
    assert str(caught.value) == (
        "run.name: 'mine': whether its lock still holds cannot be read: Input/output error; the same command goes on"
        " with the run"
    )
