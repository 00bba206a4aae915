"""Measure the source tree against its budget: the size of the code, its density, and what pins its inside.

python tools/measure_code.py [ROOT] [--check]

Print each figure and its limit. With --check, print only what is wrong: a figure above its limit in
tools/code_budget.json, or a module in the root of the package. Then exit with 1. An import cycle is an error in both
cases. The script imports none of the files that it reads.

The unit of size is a node of the syntax tree: layout does not change their number. Contexts (Load, Store, Del) and
docstrings do not count. Folders called contrib have limits of their own.
"""

import argparse
import ast
import gc
import io
import json
import math
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

PACKAGE = "olora_ray"
ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).with_name("code_budget.json")
COLUMNS = 100
# A limit on nodes is a multiple of this, so that a small function fits without a new limit.
STEP = 500
CONTEXTS = (ast.Load, ast.Store, ast.Del)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
RAY_PRIVATE = re.compile(r"ray(?:\.\w+)*\.(?:_private|_raylet|_internal|_common)\b")
PRIVATE = re.compile(r"_[a-z]")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "root", nargs="?", type=Path, default=ROOT, help="a tree with olora_ray/ and tests/"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if something is wrong")
    args = parser.parse_args(argv)
    # Syntax trees are no garbage, and Python's search for garbage would double the time.
    gc.disable()
    tree = Tree(args.root)
    if not tree.modules:
        raise SystemExit(f"{args.root / PACKAGE}: no Python files")
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    try:
        measured = figures(tree)
    except CycleError as error:
        raise SystemExit(f"an import cycle: {', '.join(error.args[1])}") from None

    if args.check:
        lines = misplaced(tree) + over_limit(measured, budget)
        for line in lines:
            print(line, file=sys.stderr)
        return 1 if lines else 0
    for name, value in measured.items():
        print(f"{value:>8}  {name}  (at most {budget[name]})")
    return 0


class File:
    """A Python file; it is parsed when its nodes are first asked for."""

    def __init__(self, path: Path, root: Path) -> None:
        place = path.relative_to(root)
        self.name = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        self.text = path.read_text(encoding="utf-8")
        self.is_contrib = "contrib" in place.parts
        self.is_filled = self.text.strip() != ""

    @cached_property
    def nodes(self) -> list[ast.AST]:
        tree = ast.parse(self.text)
        return [node for node in ast.walk(tree) if not isinstance(node, CONTEXTS)]

    @cached_property
    def docstrings(self) -> list[ast.Expr]:
        """The texts that stand alone: docstrings, and the help below a field."""
        return [node for node in self.nodes if isinstance(node, ast.Expr) and _is_text(node.value)]

    @property
    def size(self) -> int:
        # A docstring is two nodes, a statement and its text.
        return len(self.nodes) - 2 * len(self.docstrings)

    @cached_property
    def docstring_lines(self) -> set[int]:
        lines: set[int] = set()
        for node in self.docstrings:
            lines.update(_lines(node.lineno, node.end_lineno))
        return lines

    @cached_property
    def code_lines(self) -> int:
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in NO_CODE:
                lines.update(_lines(token.start[0], token.end[0]))
        return len(lines - self.docstring_lines)

    @property
    def wide_lines(self) -> int:
        count = 0
        for number, line in enumerate(self.text.split("\n"), 1):
            is_comment = line.lstrip().startswith("#") or number in self.docstring_lines
            if len(line) > COLUMNS and not is_comment:
                count += 1
        return count


class Tree:
    """The files of a project, and the imports among the modules of its package."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules = {file.name: file for file in _files(root, PACKAGE)}
        self.imports = {name: _imported(file, self.modules) for name, file in self.modules.items()}
        self.users: dict[str, set[str]] = defaultdict(set)
        for name, targets in self.imports.items():
            for target in targets:
                self.users[target].add(name)


def figures(tree: Tree) -> dict[str, float]:
    """Return all figures, by the names of tools/code_budget.json."""
    modules = [file for file in tree.modules.values() if file.is_filled]
    package = [file for file in modules if not file.is_contrib]
    recipes = [file for file in _files(tree.root, "pipelines") if file.is_filled]
    core = package + [file for file in recipes if not file.is_contrib]
    contrib = [file for file in modules + recipes if file.is_contrib]
    tests = _files(tree.root, "tests")
    benchmarks = _files(tree.root, "benchmarks")

    nodes = sum(file.size for file in core)
    lines = sum(file.code_lines for file in core)
    wide = sum(file.wide_lines for file in core)
    statements = sum(_statements(file) for file in core)
    dense = Counter(chain.from_iterable(_dense_forms(file) for file in core))
    depths = import_depths(tree.imports)
    called_once = sum(_called_once(file) for file in package)

    def per_nodes(count: int) -> float:
        return round(10_000 * count / max(1, nodes), 1)

    pages = (tree.root / "docs").rglob("*.md")
    written = [page for page in pages if "generated" not in page.parts]
    return {
        "nodes of package and pipelines": nodes,
        "nodes per line of code": round(nodes / max(1, lines), 2),
        "nodes per statement": round(nodes / max(1, statements), 2),
        "conditional expressions per 10,000 nodes": per_nodes(dense["conditional"]),
        "packed assignments per 10,000 nodes": per_nodes(dense["packed"]),
        "assignment expressions per 10,000 nodes": per_nodes(dense["walrus"]),
        "nested comprehensions per 10,000 nodes": per_nodes(dense["nested"]),
        "texts times a condition per 10,000 nodes": per_nodes(dense["times"]),
        "private functions called once per 10,000 nodes": per_nodes(called_once),
        "lines over 100 columns per 1,000 lines": round(1000 * wide / max(1, lines), 1),
        "nodes of contrib": sum(file.size for file in contrib),
        "nodes of tests": sum(file.size for file in tests if not file.is_contrib),
        "nodes of tests of contrib": sum(file.size for file in tests if file.is_contrib),
        "lines of code in benchmarks": sum(file.code_lines for file in benchmarks),
        "messages quoted by pytest.raises": sum(
            len(re.findall(r"pytest\.raises\([^\n]*match=", file.text)) for file in tests
        ),
        "private names in tests": sum(_private_names(file) for file in tests),
        "setattr of any kind in tests": sum(file.text.count(".setattr(") for file in tests),
        "longest import chain": max((depths[file.name] for file in package), default=0),
        "uses of Ray's private modules": sum(
            len(RAY_PRIVATE.findall(file.text)) for file in package
        ),
        "private names where Ray is imported": _private_names_of_ray(package),
        "names that cross packages": len(set(_crossing(package, tree.modules))),
        "words in docs": sum(len(page.read_text(encoding="utf-8").split()) for page in written),
    }


def misplaced(tree: Tree) -> list[str]:
    """Return a line per module in the root of the package."""
    folder = tree.root / PACKAGE
    return [
        f"{PACKAGE}/{path.name}: a module in the root: give it a package"
        for path in sorted(folder.glob("*.py"))
        if path.stem not in ("__init__", "__main__")
    ]


def over_limit(measured: Mapping[str, float], budget: Mapping[str, float]) -> list[str]:
    """Return a line per figure above its limit. The line says how the limit is raised."""
    lines = []
    for name, limit in budget.items():
        value = measured[name]
        if value <= limit:
            continue
        raised = value
        if name.startswith("nodes of"):
            raised = STEP * math.ceil(value / STEP)
        more = round(raised - limit, 2)
        lines.append(
            f"{name}: {value}, at most {limit}. Make it smaller, or raise the limit to {raised} in "
            f"tools/{BUDGET.name} in the same change, with this line in the commit, where ISSUE is "
            f"the issue that states the price: Budget: +{more} {name}, #ISSUE"
        )
    return lines


def import_depths(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the length of the longest chain of imports from each module on, in modules.

    Raise CycleError if imports go round.
    """
    depths: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        below = [depths[target] for target in graph[name]]
        depths[name] = 1 + max(below, default=0)
    return depths


def _files(root: Path, folder: str) -> list[File]:
    return [File(path, root) for path in sorted((root / folder).rglob("*.py"))]


def _imported(file: File, modules: Mapping[str, File]) -> set[str]:
    # Imports in functions count too. `from a import b` imports the module a.b, if there is one.
    names = []
    for node in file.nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]

    found = set()
    for name in names:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", file.name}


def _statements(file: File) -> int:
    count = 0
    for node in file.nodes:
        if isinstance(node, ast.stmt) and not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            count += 1
    return count


def _dense_forms(file: File) -> Iterator[str]:
    """Yield a name for each form that says several things at once."""
    inside: set[ast.AST] = set()
    for node in file.nodes:
        if isinstance(node, ast.IfExp):
            yield "conditional"
        elif isinstance(node, ast.NamedExpr):
            yield "walrus"
        elif isinstance(node, ast.Assign):
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield "packed"
        elif isinstance(node, ast.BinOp):
            if _is_text_times_condition(node):
                yield "times"
        elif isinstance(node, COMPREHENSIONS):
            if node in inside:
                yield "nested"
            if len(node.generators) > 1:
                yield "nested"
            # The nodes are in the order of ast.walk: an outer comprehension comes before the inner ones.
            inside.update(ast.walk(node))


def _is_text_times_condition(node: ast.BinOp) -> bool:
    # Such as `" x" * bool(y)` and `[problem] * (count > 2)`.
    if not isinstance(node.op, ast.Mult):
        return False
    for text, times in ((node.left, node.right), (node.right, node.left)):
        if not isinstance(text, ast.JoinedStr | ast.List) and not _is_text(text):
            continue
        if isinstance(times, ast.Compare | ast.BoolOp | ast.UnaryOp):
            return True
        if _is_call_of("bool", times):
            return True
    return False


def _called_once(file: File) -> int:
    # Such a name is twice in its module: where the function is defined, and where it is called.
    words = Counter(re.findall(r"\w+", file.text))
    count = 0
    for node in file.nodes:
        if isinstance(node, FUNCTIONS) and PRIVATE.match(node.name) and words[node.name] == 2:
            count += 1
    return count


def _private_names(file: File) -> int:
    # A class may use its own private fields. os._exit and sys._getframe are public in spite of their names.
    count = 0
    for node in file.nodes:
        if isinstance(node, ast.Attribute) and PRIVATE.match(node.attr):
            owner = node.value
            if not isinstance(owner, ast.Name) or owner.id not in ("self", "cls", "os", "sys"):
                count += 1
    return count


def _private_names_of_ray(package: Iterable[File]) -> int:
    """Count private names that the package does not define, in files that import Ray.

    A private method of super() counts too, where the package has overridden it.
    """
    own = set(chain.from_iterable(_defined(file) for file in package))
    count = 0
    for file in package:
        imported: list[str] = []
        for node in file.nodes:
            if isinstance(node, ast.Import):
                imported += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported.append(node.module or "")
        if not any(name.split(".")[0] == "ray" for name in imported):
            continue
        count += sum(1 for name in imported if re.search(r"(^|\.)_[a-z]", name))
        for node in file.nodes:
            if not isinstance(node, ast.Attribute) or not PRIVATE.match(node.attr):
                continue
            if node.attr not in own or _is_call_of("super", node.value):
                count += 1
    return count


def _defined(file: File) -> Iterator[str]:
    for node in file.nodes:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _crossing(package: Iterable[File], modules: Mapping[str, File]) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what one package uses of another: names, and attributes of modules."""
    for file in package:
        home = _package(file.name)
        imported: dict[str, str] = {}
        for node in file.nodes:
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in modules:
                    imported[alias.asname or alias.name] = full
                elif node.module in modules and _package(node.module) != home:
                    yield node.module, alias.name
        for node in file.nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = imported.get(node.value.id)
                if owner and _package(owner) != home:
                    yield owner, node.attr


def _package(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_call_of(name: str, node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _lines(first: int, last: int | None) -> range:
    return range(first, (last or first) + 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
