"""pipelines/contrib holds applications: nobody imports them, they use fronts alone, and none uses another."""

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRIB = ROOT / "pipelines" / "contrib"
MEMBERS = sorted(folder.name for folder in CONTRIB.iterdir() if any(folder.glob("*.py")))
LINTER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
FRONTS = {
    contract["protected_modules"][0].removesuffix(".**"): [
        line.rpartition(" ")[2]
        for line in contract["ignore_imports"]
        if line.startswith("olora_ray.** ")
    ]
    for contract in LINTER["contracts"]
    if contract["type"] == "protected"
}
"""Package -> the modules that others may import: import-linter's contracts, which see the package alone."""
EXCEPTIONS = {
    "tools/write_configuration.py": {
        "comparison"
    },  # the schema for editors has the section compare
    "benchmarks/settings.py": {"comparison", "library_functions", "wheels"},
}


def imports(file: Path) -> Iterator[str]:
    """Yield the dotted name of each imported module; for `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_names(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


def names_of(member: str) -> set[str]:
    """Return what an import of this member begins with: its package, or a module of its folder."""
    return {member} | {file.stem for file in (CONTRIB / member).glob("[a-z]*.py")}


def files_outside() -> Iterator[Path]:
    for folder in ("olora_ray", "pipelines", "deploy", "tools", "benchmarks", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "contrib" not in file.relative_to(ROOT).parts:
                yield file


def test_nothing_outside_imports_an_application() -> None:
    names = {name for member in MEMBERS for name in names_of(member)} | {"contrib"}
    found = set()
    for file in files_outside():
        place = str(file.relative_to(ROOT))
        beside = {sibling.stem for sibling in file.parent.glob("*.py")}
        used = (top_names(file) & names) - beside - EXCEPTIONS.get(place, set())
        used |= {name for name in imports(file) if name.startswith("tests.contrib")}
        found |= {f"{place}: {name}" for name in used}
    assert found == set()


@pytest.mark.parametrize("member", MEMBERS)
def test_an_application_imports_no_other(member: str) -> None:
    own = names_of(member)
    others = {name for other in MEMBERS if other != member for name in names_of(other)} - own
    used = {name for file in (CONTRIB / member).rglob("*.py") for name in top_names(file)}
    assert used & (others | {"contrib"}) == set()


@pytest.mark.parametrize("member", MEMBERS)
def test_an_application_imports_fronts_alone(member: str) -> None:
    assert len(FRONTS) > 8
    modules = {name for file in (CONTRIB / member).rglob("*.py") for name in imports(file)}
    inside = {name for name in modules if is_inside(name)}
    assert inside == set()


def is_inside(name: str) -> bool:
    """True if this is a module of a package that has a front, and not of the front."""
    package = ".".join(name.split(".")[:2])
    path = ROOT / Path(*name.split("."))
    if package not in FRONTS or not path.with_suffix(".py").is_file():
        return False
    return not any(fnmatch(name, pattern) for pattern in FRONTS[package])
