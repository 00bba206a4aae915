"""Broken inputs: no exception but errors of one line, no answer after 10 s, no 2 GB, no wrong result."""

from pathlib import Path

import pytest

from tests.fuzz import runner

SMALL = dict.fromkeys(runner.READERS, 30) | {"gguf": 12, "model_folder": 25, "registry": 25}
"""Of these a second is a few."""


def check(found: dict[str, runner.Counts]) -> None:
    print(f"\n{runner.table(found)}")
    bad = [line for counts in found.values() for line in counts.bad]
    assert not bad, "\n".join([f"{len(bad)} inputs:", *bad[:40]])


def test_a_few_broken_inputs_of_each_reader(tmp_path: Path) -> None:
    check(runner.run(tmp_path, SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("name", runner.READERS)
def test_a_thousand_broken_inputs(name: str, tmp_path: Path) -> None:
    check(runner.run(tmp_path, {name: 1000}, seed=2))
