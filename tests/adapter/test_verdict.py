"""The verdict is right both ways: it refuses no right export, and passes no error."""

import shutil
from pathlib import Path

import pytest

from tests import verdicts
from tests.verdicts import PLANTED, Draw

RIGHT_FEW, PLANTED_FEW, MANY = 6, 18, 200


def refused(place: Path, numbers: range) -> list[str]:
    found = []
    for number in numbers:
        draw = Draw(number, place / f"right-{number}")
        draw.export()
        verdict = draw.verdict(logits=True)
        if not verdict.ok:
            found.append(f"{draw}: {'; '.join(verdict.problems())}")
        shutil.rmtree(draw.folder)
    return found


def missed(place: Path, numbers: range) -> list[str]:
    found = []
    for number in numbers:
        plant = PLANTED[number % len(PLANTED)]
        draw = Draw(number // len(PLANTED) + 7 * number, place / f"wrong-{number}", gross=True)
        draw.export()
        before = verdicts.contents(draw.folder)
        plant(draw)
        assert verdicts.contents(draw.folder) != before, (
            f"{plant.__name__} changed nothing in {draw}"
        )
        if draw.verdict().ok:
            found.append(f"{plant.__name__} in {draw}")
        shutil.rmtree(draw.folder)
    return found


def test_the_first_right_exports_pass(tmp_path: Path) -> None:
    assert refused(tmp_path, range(RIGHT_FEW)) == []


def test_the_first_planted_errors_are_caught(tmp_path: Path) -> None:
    assert missed(tmp_path, range(PLANTED_FEW)) == []


@pytest.mark.slow
def test_of_200_right_exports_none_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, range(MANY)) == []


@pytest.mark.slow
def test_of_200_planted_errors_none_is_missed(tmp_path: Path) -> None:
    assert missed(tmp_path, range(MANY)) == []
