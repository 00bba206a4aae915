"""Tiny models of many families: each is right to the end of a run, or refused in one line before the first step."""

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.families import oracle, table, zoo
from tests.families.check import PACKS, check
from tests.families.row import PRECISIONS, Row
from tests.families.variants import ALL, MORE, NAMED
from tools import write_models

# Families whose layers, heads, positions or files differ in some way.
QUICK = ("llama", "gpt2", "cohere", "gemma3_text", "opt 350m", "gpt_bigcode", "granite", "phi3")
MOSTLY_SLOW = [pytest.param(name, marks=() if name in QUICK[:2] else pytest.mark.slow) for name in ALL]


@cache
def row(name: str, precision: str) -> Row:
    """The results for a variant; measured once."""
    with tempfile.TemporaryDirectory() as folder:
        return check(ALL[name], precision, Path(folder))


def rows(precision: str) -> list[Row]:
    return [row(name, precision) for name in ALL]


def test_the_zoo_has_the_variants_of_the_review_and_others() -> None:
    assert len(NAMED) == 56
    assert len(MORE) >= 8
    assert len(ALL) == len(NAMED) + len(MORE)


@pytest.mark.parametrize("name", ["llama", "mamba2", "gpt_oss"])
def test_what_came_before_matters_in_a_model_of_the_zoo(name: str) -> None:
    model, ids = zoo.make(ALL[name]), torch.arange(2, 42)[None]
    other = ids.clone()
    other[0, 0] = 50
    before, after = (model(input_ids=each, use_cache=False).logits[0, 8] for each in (ids, other))
    assert float((before - after).abs().max()) > 0.05


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_two_attentions_of_transformers_say_the_same(name: str, tmp_path: Path) -> None:
    # The reference of the check does not depend on the attention; see oracle.py for the exception.
    zoo.build(ALL[name], tmp_path)
    picked, eager = oracle.load(tmp_path), oracle.load(tmp_path, attention="eager")
    off = oracle.difference(oracle.losses(picked, PACKS), oracle.losses(eager, PACKS))
    assert (off < 1e-6) is (name != "falcon alibi")


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
def test_the_table(precision: str) -> None:
    found = rows(precision)
    named = [each for each in found if each.name in NAMED]
    print(f"\n{precision}: {table.summary(named)}; with others: {table.summary(found)}\n{table.table(found)}")
    assert [each.name for each in found if not (each.right or each.refused)] == []
    assert sum(each.right for each in named) >= 44


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
