"""The ten mornings: their person and their engine, and all of it by the command that users call."""

import subprocess
import sys

import pytest

from tests.contrib.demos import person
from tests.contrib.demos.person import KINDS
from tests.pipelines import project


@pytest.mark.ray
@pytest.mark.slow
def test_ten_mornings_are_as_they_must_be() -> None:
    command = [sys.executable, "-m", "tests.contrib.demos.mornings"]
    done = subprocess.run(
        command, cwd=project.ROOT, capture_output=True, text=True, timeout=3500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("ten mornings were as they must be")


@pytest.mark.parametrize("name", KINDS)
def test_right_answers_have_their_kinds_mark_alone(name: str) -> None:
    kind = KINDS[name]
    for thing in person.things():
        assert kind.mark not in kind.answer(thing, right=False)
        marks = {
            each.mark for each in KINDS.values() if each.mark in kind.answer(thing, right=True)
        }
        assert marks == {kind.mark}
