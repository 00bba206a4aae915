"""The recipe next_places: its rows are the same each time, and its run takes them."""

from pathlib import Path

import pytest

from tests.contrib.mobility.conftest import MOBILITY
from tests.pipelines.test_recipes import check_rows


def test_the_rows_are_the_same_each_time_and_taken_by_the_run(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_rows(MOBILITY / "next_places", tiny_model, tmp_path)
    assert capsys.readouterr().out.count(", none rejected") == 2
