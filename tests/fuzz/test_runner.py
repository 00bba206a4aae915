"""The harness sees what it is there to see."""

from pathlib import Path

import pytest

from tests.fuzz import mutate, runner


def test_each_outcome_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LATE", 1.0)
    found = runner.run(tmp_path, {"_everything": 14})["_everything"]
    assert dict(found.kinds) == {"ok": 5, "refused": 1, "traceback": 3, "late": 1, "large": 2, "wrong": 2}
    assert [line.split(":")[0] for line in found.bad] == [f"_everything {number}" for number in range(2, 10)]
    assert runner.table({"_everything": found}).splitlines()[2] == "|  everything | 14 | 5 | 1 | 3 | 1 | 2 | 2 |"


@pytest.mark.parametrize("seed", range(30))
def test_the_same_seed_makes_the_same_input(seed: int) -> None:
    from random import Random

    tree = {"a": [1, {"b": "text"}], "c": None}
    made = [mutate.as_json(mutate.tree(Random(seed), tree), Random(seed)) for _ in range(2)]
    assert made[0] == made[1]
    assert tree == {"a": [1, {"b": "text"}], "c": None}
    assert mutate.raw(Random(seed), b"some bytes") == mutate.raw(Random(seed), b"some bytes")
