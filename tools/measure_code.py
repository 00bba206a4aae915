"""Measures the source tree: how much a newcomer must read, and how much of its inside the tests depend on.

python tools/measure_code.py [ROOT] [--check]

Prints one figure per line. --check also prints each figure above its limit in tools/code_budget.json, each module in
the root of the package and each import cycle, and then exits with 1 if there is any. A limit rises only by the price
that an issue states, and the commit names the issue. The script imports none of the files that it reads.
"""

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "olora_ray"
ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).with_name("code_budget.json")
RAY_PRIVATE = re.compile(r"ray(?:\.\w+)*\.(?:_private|_raylet|_internal|_common)\b")
Graph = Mapping[str, set[str]]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "root",
        nargs="?",
        type=Path,
        default=ROOT,
        help="a tree with olora_ray/, tests/ and README.md",
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a figure is above its limit"
    )
    args = parser.parse_args(argv)
    tree = Tree(args.root)
    if not tree.modules:
        raise SystemExit(f"{args.root / PACKAGE}: no Python files")
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    for name, value in figures(tree).items():
        print(f"{value:>8}  {name}" + (f"  (at most {budget[name]})" if name in budget else ""))
    lines = problems(tree, budget) if args.check else []
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


@dataclass(frozen=True)
class Module:
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @cached_property
    def comments_and_code(self) -> tuple[int, int]:
        """(lines with only a comment, lines of code); blank lines and docstrings are neither."""
        comments: set[int] = set()
        code: set[int] = set()
        lines = self.text.split("\n")
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith(
                "#"
            ):
                comments.add(token.start[0])
            elif token.type not in _NO_CODE:
                code.update(range(token.start[0], token.end[0] + 1))
        return len(comments), len(code - set(_text_lines(self.tree)))


_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


class Tree:
    """The modules of the package and of the tests, by their dotted names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules = _read(root, PACKAGE)
        self.tests = _read(root, "tests")
        self.recipes = _read(root, "pipelines")
        self.imports = {
            name: _imported(name, one.tree, self.modules) for name, one in self.modules.items()
        }
        self.users: dict[str, set[str]] = defaultdict(set)
        for name, targets in self.imports.items():
            for target in targets:
                self.users[target].add(name)
        self.filled = {name: module for name, module in self.modules.items() if module.text.strip()}


def figures(tree: Tree) -> dict[str, int]:
    filled, users = tree.filled, tree.users
    counts = [module.comments_and_code for module in filled.values()]
    tests = list(tree.tests.values())
    readme = tree.root / "README.md"
    pages = {
        page: len(page.read_text(encoding="utf-8").split())
        for page in (tree.root / "docs").rglob("*.md")
    }
    recipes = [module.comments_and_code for module in tree.recipes.values()]
    return {
        "lines of code in package and pipelines": sum(code for _, code in (*counts, *recipes)),
        "modules in the package": len(filled),
        "longest file, lines": max(module.lines for module in filled.values()),
        "modules that other packages import": sum(
            any(_package(user) != _package(name) for user in users[name]) for name in filled
        ),
        "modules with one importer, in the same folder": sum(
            {_folder(user) for user in users[name]} == {_folder(name)} and len(users[name]) == 1
            for name in filled
        ),
        "longest import chain": longest_chain(tree.imports),
        "numeric constants of modules": sum(
            _numeric_constants(module.tree) for module in filled.values()
        ),
        "uses of Ray's private modules": sum(
            len(RAY_PRIVATE.findall(module.text)) for module in filled.values()
        ),
        "names that cross packages": len(set(_crossing(tree.modules))),
        "except clauses": sum(
            isinstance(node, ast.ExceptHandler) for node in _nodes(filled.values())
        ),
        "setattr of any kind in tests": sum(module.text.count(".setattr(") for module in tests),
        "private names in tests": sum(_private_names(module.tree) for module in tests),
        "lines of tests": sum(module.lines for module in tests),
        "lines of README": readme.read_text(encoding="utf-8").count("\n") if readme.exists() else 0,
        "words of docs": sum(
            words for page, words in pages.items() if page.parent.name != "generated"
        ),
        "words of docs with generated pages": sum(pages.values()),
        "docstrings": sum(_docstrings(module.tree) for module in filled.values()),
        "lines of comments": sum(comments for comments, _ in counts),
    }


def problems(tree: Tree, budget: Mapping[str, int]) -> list[str]:
    """Return one line per figure above its limit, misplaced module and import cycle."""
    lines = [
        f"{PACKAGE}/{name.rpartition('.')[2]}.py: a module in the root: give it a package"
        for name in tree.modules
        if name.count(".") == 1
        and not name.endswith(".__main__")
        and not any(other.startswith(name + ".") for other in tree.modules)
        and not (tree.root / PACKAGE / name.rpartition(".")[2]).is_dir()
    ]
    lines += [
        f"{name}: {value}, at most {budget[name]}"
        for name, value in figures(tree).items()
        if value > budget.get(name, value)
    ]
    return lines + [f"an import cycle: {', '.join(cycle)}" for cycle in cycles(tree.imports)]


def cycles(graph: Graph) -> list[tuple[str, ...]]:
    """Return the strongly connected components of more than one module, the largest first."""
    reached = {name: _reached(name, graph) for name in graph}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return sorted(groups, key=lambda group: (-len(group), group))


def longest_chain(graph: Graph) -> int:
    """Return the length of the longest chain of imports in modules; each module counts once."""
    depth: dict[str, int] = {}

    def walk(name: str, path: frozenset[str]) -> int:
        if name in path:
            return 0
        if name not in depth:
            depth[name] = 1 + max((walk(other, path | {name}) for other in graph[name]), default=0)
        return depth[name]

    return max(walk(name, frozenset()) for name in graph)


def _read(root: Path, folder: str) -> dict[str, Module]:
    modules = {}
    for file in sorted((root / folder).rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = Module(text, ast.parse(text))
    return modules


def _imported(name: str, tree: ast.Module, modules: Mapping[str, Module]) -> set[str]:
    # Imports in functions count too. `from a import b` imports the module a.b, if there is one.
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(_existing(alias.name, modules) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports.update(
                _existing(f"{node.module}.{alias.name}", modules) for alias in node.names
            )
    return imports - {"", name}


def _existing(dotted: str, modules: Mapping[str, Module]) -> str:
    """Return the longest prefix of a dotted name that is a module of the package, or ''."""
    while dotted and dotted not in modules:
        dotted = dotted.rpartition(".")[0]
    return dotted if dotted != PACKAGE else ""


def _nodes(modules: Iterable[Module]) -> Iterator[ast.AST]:
    for module in modules:
        yield from ast.walk(module.tree)


def _crossing(modules: Mapping[str, Module]) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what one package uses of another: imported names, and attributes of imported modules."""
    for user, module in modules.items():
        imported: dict[str, str] = {}
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            for alias in node.names:
                if (full := f"{node.module}.{alias.name}") in modules:
                    imported[alias.asname or alias.name] = full
                elif node.module in modules and _package(node.module) != _package(user):
                    yield node.module, alias.name
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = imported.get(node.value.id)
                if owner and _package(owner) != _package(user):
                    yield owner, node.attr


def _reached(start: str, graph: Graph) -> set[str]:
    reached: set[str] = set()
    ahead = [start]
    while ahead:
        new = graph[ahead.pop()] - reached
        reached |= new
        ahead.extend(new)
    return reached


def _package(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _folder(name: str) -> str:
    return name.rpartition(".")[0]


def _numeric_constants(tree: ast.Module) -> int:
    return sum(
        isinstance(target, ast.Name)
        and target.id.isupper()
        and value is not None
        and _is_numeric(value)
        for target, value in _assignments(tree.body)
    )


def _assignments(body: Iterable[ast.stmt]) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    for node in body:
        if isinstance(node, ast.Assign):
            yield node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign):
            yield node.target, node.value


def _is_numeric(value: ast.expr) -> bool:
    # 4 * 2**30 is a constant too.
    return all(
        isinstance(part.value, int | float)
        if isinstance(part, ast.Constant)
        else isinstance(part, ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop)
        for part in ast.walk(value)
    )


def _private_names(tree: ast.Module) -> int:
    # A class may use its own private fields. os._exit and sys._getframe are public in spite of their names.
    return sum(
        isinstance(node, ast.Attribute)
        and re.match("_[a-z]", node.attr) is not None
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os", "sys"))
        for node in ast.walk(tree)
    )


def _docstrings(tree: ast.Module) -> int:
    # A text below an attribute is not counted: in a config it is the help of the setting.
    owners = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return sum(
        isinstance(node, owners) and ast.get_docstring(node) is not None for node in ast.walk(tree)
    )


def _text_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
