"""Nothing happens at a fault point unless a handler is installed, and every point is one that the product reaches."""

import ast
import re
from pathlib import Path

import pytest

from olora_ray.common import fault_points

PACKAGE = Path(fault_points.__file__).parents[1]


def test_a_handler_is_told_and_what_it_raises_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    fault_points.reached("step", 3, 1)  # without one nothing happens
    told: list[tuple[str, int | None, int | None]] = []

    def handle(point: str, step: int | None, rank: int | None) -> None:
        told.append((point, step, rank))
        if point == "export":
            raise RuntimeError("injected")

    monkeypatch.setattr(fault_points, "handler", handle)
    fault_points.reached("step", 3, rank=1)
    with pytest.raises(RuntimeError, match="injected"):
        fault_points.reached("export")
    assert told == [("step", 3, 1), ("export", None, None)]


def test_the_points_that_are_described_are_those_of_the_product() -> None:
    described = re.findall(r"^    (\w+) {2,}", fault_points.__doc__ or "", re.MULTILINE)
    found = [
        node.args[0].value
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) == "reached"
        and isinstance(node.args[0], ast.Constant)
    ]
    assert sorted(found) == sorted(described)
