"""Tiny models of many families: each is right to the end of a run, or refused in one line before the first step."""

import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests.families import table
from tests.families.check import check
from tests.families.row import PRECISIONS, Row
from tests.families.variants import ALL
from tools import write_models

# Families whose layers, heads, positions or files differ in some way.
QUICK = ("llama", "gpt2", "cohere", "gemma3_text", "opt 350m", "gpt_bigcode", "granite", "phi3")


@cache
def row(name: str, precision: str) -> Row:
    """The results for a variant; measured once."""
    with tempfile.TemporaryDirectory() as folder:
        return check(ALL[name], precision, Path(folder))


def rows(precision: str) -> list[Row]:
    return [row(name, precision) for name in ALL]


@pytest.mark.parametrize("name", QUICK)
def test_some_families_are_right(name: str) -> None:
    assert row(name, "fp32").verdict == "right"


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ALL)
def test_every_family_is_right_or_refused_before_the_first_step(name: str, precision: str) -> None:
    found = row(name, precision)
    assert found.right or found.refused, found.verdict
    assert "\n" not in found.verdict
    if found.right:
        assert found.experts in ("none", "yes"), "experts are left out without a word"


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_page_says_what_is_measured(precision: str) -> None:
    # If this fails, run: make models.
    told = {name: verdict.partition(":")[0] for name, verdict in _told(precision).items()}
    assert told == {each.name: each.verdict.partition(":")[0] for each in rows(precision)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_page_names_every_variant(precision: str) -> None:
    # If this fails, run: make models.
    assert sorted(_told(precision)) == sorted(ALL)


def _told(precision: str) -> dict[str, str]:
    """Model -> verdict in the section of docs/generated/models.md for a precision."""
    page, heading = write_models.PAGE.read_text(encoding="utf-8"), write_models.heading(precision)
    return table.told(page.split(f"{heading}\n")[1].split("\n## ")[0])
