"""What a node keeps of other places has a bound, and what is in use stays."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olora_ray.common import node_cache

HOLD = """
import sys
from pathlib import Path
from olora_ray.common import node_cache
node_cache.hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
MAKE = """
import sys, time
from pathlib import Path
from olora_ray.common import node_cache
def make(partial):
    time.sleep(0.3)
    partial.touch()
    with open(sys.argv[2], "a") as made:
        made.write("x")
node_cache.cached(Path(sys.argv[1]), make)
"""


def entry(root: Path, name: str, age: float, size: int = 100) -> Path:
    folder = root / name
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(b"x" * size)
    aged(folder, age)
    return folder


def aged(path: Path, age: float) -> None:
    os.utime(path, (time.time() - age,) * 2)


def made_room(root: Path, limit: int) -> list[str]:
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    node_cache.make_room(root, entries, limit)
    return [path.name for path in entries if path.exists()]


def test_what_was_not_used_for_longest_goes_until_it_fits(tmp_path: Path) -> None:
    for name, age in (("a", 5000.0), ("b", 7000.0), ("c", 6000.0)):
        entry(tmp_path, name, age)
    assert made_room(tmp_path, 300) == ["a", "b", "c"]
    assert made_room(tmp_path, 299) == ["a", "c"]
    assert made_room(tmp_path, 150) == ["a"]
    assert made_room(tmp_path, 0) == []


def test_what_was_used_a_moment_ago_stays(tmp_path: Path) -> None:
    entry(tmp_path, "a", 5000.0)
    node_cache.used(tmp_path / "a")
    entry(tmp_path, "b", 4000.0)
    assert made_room(tmp_path, 0) == ["a"]


def test_what_a_living_process_holds_stays(tmp_path: Path) -> None:
    held = entry(tmp_path, "a", 5000.0)
    command = [sys.executable, "-c", HOLD, str(held)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        for path in (held, *tmp_path.glob(".*")):
            aged(path, 5000.0)
        assert made_room(tmp_path, 0) == ["a"]
        process.kill()
    assert made_room(tmp_path, 0) == []


def test_what_a_killed_download_has_left_goes(tmp_path: Path) -> None:
    entry(tmp_path, "a", 0)
    for name, age in ((".old.tmp", 1e6), (".new.tmp", 10.0)):
        (tmp_path / "a" / name).mkdir()
        aged(tmp_path / "a" / name, age)
    made_room(tmp_path, 10**6)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".new.tmp", "model"]


def test_of_several_processes_one_makes_an_entry_and_the_others_wait(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE, str(tmp_path / "deep" / "entry"), str(tmp_path / "made")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_what_could_not_be_made_is_tried_again(tmp_path: Path) -> None:
    def broken(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("cut off")

    with pytest.raises(OSError):
        node_cache.cached(tmp_path / "entry", broken)
    assert (
        node_cache.cached(
            tmp_path / "entry", lambda partial: partial.write_text("whole")
        ).read_text()
        == "whole"
    )
