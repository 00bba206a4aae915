"""Files as other tools write them are read right from their paths alone, or refused with one line."""

from collections.abc import Callable
from functools import lru_cache

import pytest

from tests.data import other_tools as bar


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bar.File], str]:
    @lru_cache(None)
    def told(file: bar.File) -> str:
        if file.tool == "TRL":
            pytest.importorskip("trl")
        return bar.outcome(file, tmp_path_factory.mktemp("file"))

    return told


@pytest.mark.parametrize("file", bar.FILES, ids=lambda file: file.name)
def test_a_file_is_read_right_or_refused(file: bar.File, outcome: Callable[[bar.File], str]) -> None:
    expected = "refused: " if file.cannot or file.rows.turns is None else "right: "
    assert outcome(file).startswith(expected), outcome(file)


def test_the_table(outcome: Callable[[bar.File], str]) -> None:
    # pytest -rP prints it.
    for file in bar.FILES:
        print(f"{file.name} | {outcome(file)}")
    right = sum(outcome(file).startswith("right: ") for file in bar.FILES)
    print(f"{right} of {len(bar.FILES)} files are read right")
    assert right >= 95
