"""Broken inputs: no exception but errors of one line, no answer after 10 s, no 2 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from tests.fuzz.child import outcome

READERS = sorted(file.stem for file in (Path(__file__).parent / "readers").glob("[a-z]*.py"))
# Of these a second is a few.
SMALL = dict.fromkeys(READERS, 30) | {"gguf": 12, "model_folder": 25}
GOOD = ("ok", "refused")


def check(folder: Path, counts: dict[str, int], seed: int = 1) -> None:
    words = [f"{name}:{count}" for name, count in counts.items()]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.child", str(folder), str(seed), *words],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        cwd=Path(__file__).parents[2],
        timeout=1800,
    )
    inputs, found = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
    assert done.returncode == 0, (
        f"{inputs[-1:]} ended the process ({done.returncode}): {done.stderr[-800:]}"
    )
    assert len(found) == sum(counts.values())
    bad = [
        f"{name}: {line}"
        for name, line in zip(inputs, found, strict=True)
        if json.loads(line)[0] not in GOOD
    ]
    assert not bad, "\n".join([f"{len(bad)} inputs:", *bad[:40]])


def test_a_few_broken_inputs_of_each_reader(tmp_path: Path) -> None:
    check(tmp_path, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_thousand_broken_inputs(name: str, tmp_path: Path) -> None:
    check(tmp_path, {name: 1000}, seed=2)


def test_the_harness_sees_what_it_is_there_to_see(tmp_path: Path) -> None:
    class Reader:
        @staticmethod
        def read(content: BaseException | None, place: Path, made: None) -> None:
            if content:
                raise content

    errors = [None, UserError("x"), KeyError("x"), MemoryError()]
    found = [outcome(Reader, error, tmp_path, None)[0] for error in errors]
    assert found == ["ok", "refused", "traceback", "large"]
