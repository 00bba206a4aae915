"""One driver a run: the second leaves, and one that has lost its run stops at once."""

import json
import os
import time
from pathlib import Path

import pytest

from olora_ray.cluster.connection import Stop
from olora_ray.common import storage
from olora_ray.common.errors import TakenOver, TryAgain
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.pipeline.run import only_driver
from tests import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny.config(run__name="mine", run__storage=str(tmp_path / "runs"))


def lock_of(config: Config) -> Path:
    return Path(config.run.storage) / "locks" / "runs" / f"{config.run.name}.json"


def take_over(config: Config) -> None:
    """As another process does once this one was silent for too long."""
    place = lock_of(config)
    storage.write_text(
        str(place), json.dumps({**json.loads(place.read_text()), "token": "another"})
    )


def hide(config: Config) -> None:
    """Have the storage not give the lock's file from now on."""
    lock_of(config).unlink()
    lock_of(config).mkdir()


def test_a_second_driver_leaves_and_says_who_works_on_the_run(config: Config) -> None:
    with only_driver(config), pytest.raises(TryAgain) as caught, only_driver(config):
        pass
    assert caught.value.exit_code == 75
    assert str(caught.value).startswith(
        f"run.name: 'mine' is already running (process {os.getpid()} on "
    )
    assert ", since 20" in str(caught.value)
    assert "set another run.name" in str(caught.value)
    with only_driver(config), only_driver(override(config, {"run.name": "another"})):
        pass


@pytest.mark.parametrize("gentle", [False, True])
def test_who_has_lost_the_run_stops_at_once(config: Config, gentle: bool) -> None:
    stop = Stop()
    stop.gentle = gentle  # even while a first signal would be a wish
    with only_driver(config) as mine:
        take_over(config)
        with pytest.raises(TakenOver) as caught, stop, mine.watch(stop, every=0.05):
            time.sleep(30)
    assert caught.value.exit_code == 75


def test_a_storage_that_does_not_answer_for_a_while_ends_nothing_that_can_be_done_twice(
    config: Config,
) -> None:
    with only_driver(config) as mine, Stop() as stop:
        hide(config)
        with mine.watch(stop, every=0.01):
            time.sleep(0.2)
        with pytest.raises(TakenOver) as caught:
            mine.check()
        lock_of(config).rmdir()
    assert caught.value.exit_code == 75
    told = str(caught.value)
    assert told.startswith("run.name: 'mine': its lock cannot be read: ")
    assert told.endswith("is a directory; run the same command again to resume")
