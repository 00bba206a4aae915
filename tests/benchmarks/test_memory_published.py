"""The plan beside published peaks: the script runs, and each figure says where it is from."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def published(benchmark: Any) -> Any:
    return benchmark("memory_published")


def test_each_figure_has_a_source(published: Any) -> None:
    assert len(published.CASES) >= 25
    for case in published.CASES:
        source = case.source
        assert source.where.startswith("https://github.com/")
        assert source.measures in ("allocated", "reserved")
        assert source.open
        assert case.peak > 2**30
        assert case.model in published.MODELS
    assert all(name and reason for name, reason in published.NOT_COMPARABLE)


@pytest.mark.parametrize("name", ["LitGPT, tables", "FMS, PowerLM"])
def test_the_plan_of_a_case_is_near_its_figure(published: Any, name: str, tmp_path: Path) -> None:
    case = next(case for case in published.CASES if case.source.name == name)
    assert published.plan(case, str(tmp_path)) == pytest.approx(case.peak, rel=0.15)
