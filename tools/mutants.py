"""Breaks the package on purpose, a little at a time, and reports which breaks the tests notice.

python tools/mutants.py PACKAGE... [--modules NAME...] [--each 8] [--seed 0] [--out FILE] [--only FILE]

A mutant is a module with one change: a comparison turned, a statement dropped, a constant moved or a branch forced. It
runs against the tests of tests/PACKAGE that call the changed function, without those that start a process or a Ray.
`--out` appends one line of JSON per mutant to a file. `--only` runs those mutants of such a file again that died.

Imports take longer than most tests, so one process imports torch and the rest once, and forks for each mutant. The fork
imports the changed module from memory: nothing is written to the tree. A mutant is named by its function, its kind and
its number within the function, so that a change elsewhere in the module keeps the name.
"""

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import pickle
import random
import resource
import select
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PACKAGE = "olora_ray"
LIMIT = 20.0  # seconds of tests per drawn mutant; one that was killed before gets all of its tests
MEMORY = 6 << 30  # bytes of a mutant, of which some never stop to take more
OUTCOMES = ("killed", "survived", "not covered", "stillborn")
TURNED: dict[type, type] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


class Mutant(NamedTuple):
    module: str
    function: str
    kind: str
    number: int


def mutants_of(module: str, tree: ast.Module) -> Iterator[tuple[Mutant, Callable[[], None]]]:
    """Yield a mutant for each place that can be changed, with what changes the tree there."""
    seen: Counter[tuple[str, str]] = Counter()
    for function, node in _places(tree, ""):
        for kind, change in _changes(node):
            yield Mutant(module, function, kind, seen[function, kind]), change
            seen[function, kind] += 1


def mutated(mutant: Mutant, source: str) -> ast.Module | None:
    tree = ast.parse(source)
    for each, change in mutants_of(mutant.module, tree):
        if each == mutant:
            change()
            return ast.fix_missing_locations(tree)
    return None


def _places(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield the nodes below a node, each with the name of its function as in `__qualname__`."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            inner = function
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                is_class = isinstance(node, (ast.ClassDef, ast.Module))
                scope = function if is_class else f"{function}.<locals>"
                inner = f"{scope}.{child.name}".removeprefix(".")
            yield inner, child
            yield from _places(child, inner)


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    if isinstance(node, ast.Compare):
        yield "turned", partial(setattr, node, "ops", [TURNED[type(each)]() for each in node.ops])
    elif isinstance(node, (ast.If, ast.IfExp)):
        for forced in (True, False):
            yield "forced", partial(setattr, node, "test", ast.Constant(forced))
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        value: Any = node.value
        moved = not value if isinstance(value, bool) else value + 1
        yield "moved", partial(setattr, node, "value", moved)
    for field in ("body", "orelse", "finalbody"):
        body = getattr(node, field, None)
        if not isinstance(body, list):
            continue
        for index, statement in enumerate(body):
            if _can_be_dropped(statement):
                yield "dropped", partial(body.__setitem__, index, ast.Pass())


def _can_be_dropped(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.Assign):  # without a name, all of its readers would fail
        return not isinstance(statement.targets[0], (ast.Name, ast.Tuple))
    return isinstance(statement, (ast.AugAssign, ast.Raise, ast.Delete))


class Mutated(importlib.abc.MetaPathFinder):
    """Serves one module from a tree instead of from its file."""

    def __init__(self, module: str, file: Path, tree: ast.Module) -> None:
        self.module = module
        self.file = str(file)
        self.tree = tree

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.module:
            return None
        loader = importlib.machinery.SourceFileLoader(name, self.file)
        code = compile(self.tree, self.file, "exec", dont_inherit=True)
        loader.get_code = lambda fullname: code  # type: ignore[method-assign]
        return importlib.util.spec_from_file_location(name, self.file, loader=loader)


class Calls:
    """A plug-in of pytest that records the seconds of each test, and the package's functions that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.called: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.fixtures: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.now: set[tuple[str, str]] = set()

    def trace(self, frame: Any, event: str, argument: Any) -> None:
        module = frame.f_globals.get("__name__") or ""
        code = frame.f_code
        if module.startswith(PACKAGE) and code.co_flags & 1:  # not the body of a module or class
            self.now.add((module, code.co_qualname.split(".<locals>.<")[0]))

    def pytest_runtest_setup(self, item: Any) -> None:
        self.now = self.called[item.nodeid]
        self.start = time.perf_counter()
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    def pytest_fixture_setup(self, fixturedef: Any) -> None:
        # Tests share a fixture, and all of them stand on what made it.
        self.now = self.fixtures[fixturedef.argname]

    def pytest_runtest_call(self, item: Any) -> None:
        self.now = self.called[item.nodeid]
        for name in item.fixturenames:
            self.now |= self.fixtures.get(name, set())

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = time.perf_counter() - self.start


class Hasty:
    """A plug-in of pytest with which a failed property is not made smaller."""

    def pytest_configure(self) -> None:
        import hypothesis

        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        profile = hypothesis.settings(hypothesis.settings(), phases=phases)
        hypothesis.settings.register_profile("hasty", profile)
        hypothesis.settings.load_profile("hasty")


def run_tests(tests: Iterable[str], *plugins: Any) -> int:
    import pytest

    options = ["--no-processes", "-m", "not ray and not slow", "-p", "no:cacheprovider", "--tb=no"]
    return int(pytest.main([*options, *tests], plugins=list(plugins)))


def in_a_fork(work: Callable[[], Any], seconds: float) -> Any:
    """Return what `work` returns in a fork; None if the fork ends early or takes longer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(reader)
        silent = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(silent, number)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        try:
            answer = pickle.dumps(work())
            os.write(writer, len(answer).to_bytes(8, "little"))
            with os.fdopen(writer, "wb") as out:
                out.write(answer)
        finally:
            os._exit(0)
    os.close(writer)
    answer = b""
    if select.select([reader], [], [], seconds)[0]:
        size = int.from_bytes(os.read(reader, 8), "little")
        while len(answer) < size:
            part = os.read(reader, size - len(answer))
            if not part:
                break
            answer += part
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return pickle.loads(answer) if answer else None  # noqa: S301  # of our own fork


def watch(package: str) -> Calls:
    """Run the tests of a package once, import the libraries that they needed, and return what they call."""

    def work() -> tuple[Calls, list[str]]:
        calls = Calls()
        run_tests([f"tests/{package}"], calls)
        sys.settrace(None)
        threading.settrace(None)
        own = (PACKAGE, "tests", "tools", "benchmarks", "pipelines", "__main__")
        return calls, [name for name in sys.modules if name.split(".")[0] not in own]

    found: tuple[Calls, list[str]] | None = in_a_fork(work, 3600)
    if found is None:
        sys.exit(f"tests/{package}: the tests did not come to their end")
    calls, names = found
    for name in names:
        with contextlib.suppress(Exception):  # of a module that a test made
            importlib.import_module(name)
    return calls


def tests_for(mutant: Mutant, calls: Calls, limit: float) -> list[str]:
    """Return the tests that call the mutant's function, the module's own first and then the quickest, up to a limit."""
    place = (mutant.module, mutant.function)
    chosen = [test for test in calls.seconds if place in calls.called[test]]
    if not any(place in called for called in calls.called.values()):  # code that runs at the import
        modules = {test: {module for module, _ in calls.called[test]} for test in calls.seconds}
        chosen = [test for test in calls.seconds if mutant.module in modules[test]]
    mirror = f"test_{mutant.module.rpartition('.')[2]}"
    chosen.sort(key=lambda test: (mirror not in test, calls.seconds[test]))
    spent = 0.0
    for count, test in enumerate(chosen, 1):
        spent += calls.seconds[test]
        if spent > limit:
            return chosen[:count]
    return chosen


def outcome_of(mutant: Mutant, calls: Calls, limit: float) -> str:
    file = file_of(mutant.module)
    tree = mutated(mutant, file.read_text(encoding="utf-8"))
    if tree is None:
        return "gone"
    tests = tests_for(mutant, calls, limit)
    if not tests:
        return "not covered"

    def work() -> int:
        sys.meta_path.insert(0, Mutated(mutant.module, file, tree))
        slowest = max(calls.seconds[test] for test in tests)
        return run_tests(["-x", f"--timeout={30 + 3 * slowest}", *tests], Hasty())

    code = in_a_fork(work, 60 + 3 * sum(calls.seconds[test] for test in tests))
    return {None: "killed", 0: "survived", 1: "killed", 5: "not covered"}.get(code, "stillborn")


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def drawn(package: str, modules: Sequence[str], each: int, seed: int) -> Iterator[Mutant]:
    for file in sorted((ROOT / PACKAGE / package).rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if modules and file.stem not in modules:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = [mutant for mutant, _ in mutants_of(module, tree)]
        yield from random.Random(f"{module} {seed}").sample(found, min(each, len(found)))


def killed_before(file: Path, package: str) -> Iterator[Mutant]:
    for line in file.read_text(encoding="utf-8").splitlines():
        *name, outcome = json.loads(line)
        mutant = Mutant(*name)
        if outcome == "killed" and mutant.module.startswith(f"{PACKAGE}.{package}."):
            yield mutant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--modules", nargs="+", default=[])
    parser.add_argument("--each", type=int, default=8, help="mutants per module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(os.devnull))
    parser.add_argument("--only", type=Path)
    asked = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    print("package", *OUTCOMES, "gone", sep="\t")
    for package in asked.packages:
        calls = watch(package)
        mutants = drawn(package, asked.modules, asked.each, asked.seed)
        limit = LIMIT
        if asked.only:
            mutants = killed_before(asked.only, package)
            limit = float("inf")
        found: Counter[str] = Counter()
        for mutant in mutants:
            outcome = outcome_of(mutant, calls, limit)
            found[outcome] += 1
            with asked.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps([*mutant, outcome]) + "\n")
            if asked.only and outcome != "killed":
                print(f"{outcome}: {mutant}")
        print(package, *(found[name] for name in (*OUTCOMES, "gone")), sep="\t", flush=True)


if __name__ == "__main__":
    main()
