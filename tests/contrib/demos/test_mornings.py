"""The person of the ten mornings."""

import pytest

from tests.contrib.demos import person
from tests.contrib.demos.person import KINDS


@pytest.mark.parametrize("name", KINDS)
def test_right_answers_have_their_kinds_mark_alone(name: str) -> None:
    kind = KINDS[name]
    for thing in person.things():
        assert kind.mark not in kind.answer(thing, right=False)
        marks = {
            each.mark for each in KINDS.values() if each.mark in kind.answer(thing, right=True)
        }
        assert marks == {kind.mark}
