"""What a test starts, found in its code, as marks: `ray`, `mlflow`, `server`, `process`, `browser`.

A test starts what its body, its fixtures and the functions of tests/ that they call name. What the product's
entry scripts start is not seen: such tests carry their marks themselves.
"""

import dis
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

STARTS: Mapping[str, frozenset[str]] = {
    "ray": frozenset({"ray_with", "Head", "hosts"}),
    "mlflow": frozenset({"start_run", "mlflow_database", "Server", "Nightly", "Aliases", "lifecycle"}),
    "server": frozenset({"Server"}),
    "process": frozenset({"subprocess", "Popen", "Crew", "Server", "Head", "hosts", "browser", "lifecycle"}),
    "browser": frozenset({"browser"}),
}
"""Which names in a test's code tell of which mark."""


def set_marks(item: pytest.Item) -> None:
    """Mark a test with what it starts."""
    if not isinstance(item, pytest.Function):
        return
    named = set(item.fixturenames) | set(names(item.function))
    for fixture in item.fixturenames:
        for definition in item._fixtureinfo.name2fixturedefs.get(fixture, ()):
            named |= names(definition.func)
    for mark, tells in STARTS.items():
        if named & tells and mark not in {one.name for one in item.iter_markers()}:
            item.add_marker(mark)


@cache
def names(function: Callable[..., Any]) -> frozenset[str]:
    """All names in the code of a function and of those of tests/ that it calls."""
    seen: dict[int, Any] = {}
    return frozenset(_names(inspect.unwrap(function), seen))


def _names(found: Any, seen: dict[int, Any]) -> Iterator[str]:
    if id(found) in seen or not (getattr(found, "__module__", None) or "").startswith("tests."):
        return
    seen[id(found)] = found
    if isinstance(found, type):
        for member in vars(found).values():
            yield from _names(member, seen)
    if not isinstance(found, FunctionType):
        return
    for code in _codes(found.__code__):
        for name in code.co_names:
            yield name
            yield from _names(found.__globals__.get(name), seen)
        for module, name in _attributes(code):
            holder = found.__globals__.get(module)
            if isinstance(holder, ModuleType):
                yield from _names(getattr(holder, name, None), seen)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code, and that of functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _attributes(code: CodeType) -> Iterator[tuple[str, str]]:
    """Each `module.name`."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]
    for step, after in itertools.pairwise(steps):
        if step.opname == "LOAD_GLOBAL" and after.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield step.argval, after.argval
