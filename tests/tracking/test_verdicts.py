"""Lines of verdicts at the end of a version's description."""

import pytest

from olora_ray.tracking.models import DESCRIPTION_LENGTH, HEADING, with_line


def test_lines_follow_one_another_and_none_is_written_twice() -> None:
    text = with_line("Trained on much.", "The gate: **refused**.\nIt is worse.")
    assert text == f"Trained on much.\n\n{HEADING}\n\n- The gate: **refused**. It is worse."
    assert with_line(text, "The gate: **refused**. It is worse.") == text
    both = with_line(text, "**promoted** by hand")
    assert both.endswith("- The gate: **refused**. It is worse.\n- **promoted** by hand")
    assert both.count(HEADING) == 1


@pytest.mark.parametrize("body", ["", "word " * 1500])
def test_a_description_keeps_its_length_and_the_latest_verdicts(body: str) -> None:
    text = body
    for number in range(60):
        text = with_line(text, f"verdict {number}: " + "x" * 100)
    assert len(text) <= DESCRIPTION_LENGTH
    assert "verdict 59" in text
    assert "verdict 3:" not in text
    assert text.startswith(body[:200] or HEADING)
    assert len(with_line(text, "y" * 9000)) <= DESCRIPTION_LENGTH
