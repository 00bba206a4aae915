"""The self-test has the power that docs/generated/models.md reports, in both precisions."""

from tests.families import planted
from tools import write_models


def test_the_self_test_finds_each_planted_mistake_and_no_other() -> None:
    found, none = planted.table(planted.MISTAKES), planted.table(planted.NONE)
    print(f"\n{found}\n{none}")
    assert "not found" not in found
    assert none.count("not found") == 2 * len(planted.NONE)
    assert found in write_models.PAGE.read_text(encoding="utf-8"), "make models"
