"""A GGUF file as a base model."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from olora_ray.model import source
from tests import tiny
from tests.fuzz import mutate
from tests.model.small_gguf import write


def prepare(place: Path) -> bytes:
    """A small good one."""
    return write(place / "good.gguf").read_bytes()


def warm(place: Path, made: bytes) -> None:
    """Let all be imported."""
    read(made, place, made)


def cases(seed: int, made: bytes) -> Iterator[Any]:
    """Other bytes, mostly in the header."""
    for number in range(10**9):
        random = Random(f"gguf {seed} {number}")
        yield mutate.raw(random, made, front=random.choice([None, 24, 400, 2000, 6000]))


def read(content: bytes, place: Path, made: Any) -> None:
    """Converted, as at the start of a run."""
    np.seterr(all="ignore")
    shutil.rmtree(place / "runs", ignore_errors=True)
    file = place / "model.gguf"
    file.write_bytes(content)
    source.obtain(tiny.config(model__name=str(file), run__storage=str(place / "runs")))
