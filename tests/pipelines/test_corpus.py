import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

QUICKSTART = Path(__file__).parents[2] / "pipelines" / "quickstart"
HALVES = ("train", "heldout")


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_corpus", QUICKSTART / "make_corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("half", HALVES)
def test_the_committed_file_is_what_the_generator_writes(half: str) -> None:
    assert generator().corpus(half).encode() == (QUICKSTART / f"{half}.jsonl").read_bytes()
