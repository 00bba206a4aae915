"""Does all that a reader must not do, to test the harness."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olora_ray.common.errors import UserError
from tests.fuzz.case import Case, WrongResult


class Panic(BaseException):
    """As a panic of Rust code."""


def cases(seed: int, made: Any) -> Iterator[Case]:
    """One of each, and then good ones."""
    yield from (
        Case(word) for word in ("good", "refused", "two lines", "error", "panic", "hang", "other", "fill", "die")
    )
    yield Case("good", refuse=True)
    while True:
        yield Case("good")


def read(content: str, place: Path, made: Any) -> None:
    """Do what the word says."""
    match content:
        case "refused":
            raise UserError("one line")
        case "two lines":
            raise UserError("one\nand another")
        case "error":
            raise KeyError("x")
        case "panic":
            raise Panic
        case "hang":
            while True:
                pass
        case "other":
            raise WrongResult("another than the oracle's")
        case "fill":
            bytearray(3 * 2**30)
        case "die":
            os._exit(3)
