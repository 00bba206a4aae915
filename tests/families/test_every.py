"""A tiny model of each causal family of transformers: right to the end of a run, or refused in one plain line."""

import pytest

from tests.families import every, table
from tools import write_models

# One vision family, and one with a layer that no gradient reaches.
RIGHT = ("llava", "modernbert-decoder")
QUICK = (*RIGHT, "rwkv", "musicgen", "bert")


def test_none_is_forgotten_on_the_page() -> None:
    page = (
        write_models.PAGE.read_text(encoding="utf-8")
        .split(f"{write_models.EVERY}\n")[1]
        .split("\n## ")[0]
    )
    if write_models.release() not in page:
        pytest.skip("another release of transformers, which may have other families")
    assert sorted(table.told(page)) == sorted(every.others())


@pytest.mark.parametrize(
    "family",
    [
        each if each in QUICK else pytest.param(each, marks=pytest.mark.slow)
        for each in every.others()
    ],
)
def test_a_family_is_right_or_refused_before_the_first_step(family: str) -> None:
    row = every.row(family)
    assert row.right or (row.refused and family not in RIGHT), row.verdict
    assert "\n" not in row.verdict


@pytest.mark.parametrize(
    ("family", "line"),
    [
        (
            "bert",
            "refused: model.name: BertLMHeadModel is no causal language model: its output for a token",
        ),
        (
            "rwkv",
            "refused: adapter.targets: rwkv.blocks.0.attention.output: adapters do not support .weight.div_",
        ),
        (
            "t5",
            "refused: model.name: MODEL is an encoder-decoder (t5), which cannot be trained; name a",
        ),
        (
            "clip",
            "refused: model.name: MODEL does not load: transformers has no causal language model of its type",
        ),
    ],
)
def test_what_is_refused_is_told_plainly(family: str, line: str) -> None:
    assert every.row(family).verdict.startswith(line)
