"""pyproject.toml declares each package that the code imports."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWNERS = packages_distributions()


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield each imported top-level module, and whether the import is inside a function; without those for types."""
    for each in ast.iter_child_nodes(node):
        if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING":
            continue
        modules = [alias.name for alias in each.names] if isinstance(each, ast.Import) else []
        if isinstance(each, ast.ImportFrom) and each.level == 0:
            modules = [str(each.module)]
        yield from ((module.partition(".")[0], inside) for module in modules)
        yield from imports(each, inside or isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))


def test_each_imported_package_is_declared() -> None:
    always = names(PROJECT["dependencies"])
    extras = {extra: names(wanted) for extra, wanted in PROJECT["optional-dependencies"].items()}
    optional = set().union(*(extras[extra] for extra in extras.keys() - {"dev", "bench"}))
    missing = set()
    for file in (
        file
        for folder in ("olora_ray", "pipelines")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ):
        for module, inside in imports(ast.parse(file.read_text())):
            owners = {canonicalize_name(owner) for owner in OWNERS.get(module, [])} - {"olora-ray"}
            # Packages of an extra may be absent, so a module must be importable without them.
            if (
                module not in sys.stdlib_module_names
                and owners
                and not owners & (always | optional if inside else always)
            ):
                missing.add(f"{file.relative_to(ROOT)}: {module}")
    assert missing == set()
