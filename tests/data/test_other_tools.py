"""Files as other tools write them are read right from their paths alone, or refused with one line."""

from pathlib import Path

import pytest

from tests.data import other_tools


@pytest.mark.parametrize("file", other_tools.FILES, ids=lambda file: file.name)
def test_a_file_is_read_right_or_refused(file: other_tools.File, tmp_path: Path) -> None:
    if file.tool == "TRL":
        pytest.importorskip("trl")
    expected = "refused: " if file.cannot else "right: "
    found = other_tools.outcome(file, tmp_path)
    assert found.startswith(expected), found
