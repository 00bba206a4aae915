"""The plan beside published peaks: the script runs, and each figure says where it is from."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def published(benchmark: Any) -> Any:
    return benchmark("memory_published")


@pytest.mark.parametrize("name", ["LitGPT, tables", "FMS, PowerLM"])
def test_the_plan_of_a_case_is_near_its_figure(published: Any, name: str, tmp_path: Path) -> None:
    case = next(case for case in published.CASES if case.source.name == name)
    assert published.plan(case, str(tmp_path)) == pytest.approx(case.peak, rel=0.15)
