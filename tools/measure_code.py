"""Measures the source tree: the figures that tell whether a newcomer finds the way.

    python tools/measure_code.py [ROOT] [--check]

Prints one row of Markdown for the tree at ROOT (this repository unless another is given). --check prints what is
over its limit, and exits with 1 if anything is. Nothing is imported: the files are only read.
"""

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PACKAGE = "olora_ray"
ROOT = Path(__file__).resolve().parent.parent
MOST_PACKAGES, MOST_FILE_LINES, MOST_README_LINES = 13, 600, 200
Graph = Mapping[str, set[str]]


@dataclass(frozen=True)
class Spread:
    """Median, 90th percentile and largest of a list of lengths."""

    median: float
    p90: int
    largest: int

    @classmethod
    def of(cls, lengths: Iterable[int]) -> "Spread":
        """The spread of lengths; zeros for none."""
        ordered = sorted(lengths)
        if not ordered:
            return cls(0, 0, 0)
        return cls(median(ordered), ordered[len(ordered) * 9 // 10], ordered[-1])

    def __str__(self) -> str:
        return f"{self.median:g} / {self.p90} / {self.largest}"


@dataclass(frozen=True)
class Figures:
    """What is measured of one tree."""

    file_lines: Mapping[str, int]
    """Lines by file, of the files that are not empty."""
    functions: Spread
    """Lines of functions and methods, from `def` to the end."""
    cycles: tuple[tuple[str, ...], ...]
    """Modules that import each other, directly or through others; the largest group first."""
    comments: float
    """Percent of the non-empty lines that have a comment."""
    docstrings: float
    """Percent of the non-empty lines that are docstrings, those of attributes included."""
    root_modules: tuple[str, ...]
    """Modules in the root of the package, besides __init__.py."""
    root_packages: tuple[str, ...]
    readme_lines: int

    @property
    def largest_cycle(self) -> int:
        """Modules in the largest cycle; 1 where there is none."""
        return max((len(cycle) for cycle in self.cycles), default=1)


def main(argv: Sequence[str]) -> int:
    """Print the row; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="of a tree with olora_ray/ and README.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if anything is over its limit")
    args = parser.parse_args(argv)
    figures = measure(args.root)
    print(shown(figures))
    found = problems(figures) if args.check else []
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


def measure(root: Path) -> Figures:
    """Read the tree."""
    top = root / PACKAGE
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(top.rglob("*.py"))}
    filled = {file: text for file, text in texts.items() if text.strip()}
    if not filled:
        raise SystemExit(f"{top}: no Python files there")
    trees = {file: ast.parse(text) for file, text in filled.items()}
    code = sum(1 for text in filled.values() for line in text.splitlines() if line.strip())
    readme = root / "README.md"
    return Figures(
        file_lines={str(file.relative_to(root)): len(text.splitlines()) for file, text in filled.items()},
        functions=Spread.of(lines for tree in trees.values() for lines in _function_lines(tree)),
        cycles=cycles(imports(root)),
        comments=100 * sum(map(_comments, filled.values())) / code,
        docstrings=100 * sum(map(_docstring_lines, trees.values())) / code,
        root_modules=tuple(file.stem for file in texts if file.parent == top and file.stem != "__init__"),
        root_packages=tuple(sorted({file.relative_to(top).parts[0] for file in texts if file.parent != top})),
        readme_lines=len(readme.read_text(encoding="utf-8").splitlines()) if readme.exists() else 0,
    )


def problems(figures: Figures) -> list[str]:
    """Whatever is over its limit, one line each."""
    found = [f"{PACKAGE}/{name}.py: a module in the root: give it a package" for name in figures.root_modules]
    if len(figures.root_packages) > MOST_PACKAGES:
        found.append(f"{PACKAGE}: {len(figures.root_packages)} packages in the root, at most {MOST_PACKAGES}")
    found += [
        f"{file}: {lines} lines, at most {MOST_FILE_LINES}"
        for file, lines in figures.file_lines.items()
        if lines > MOST_FILE_LINES
    ]
    if figures.readme_lines > MOST_README_LINES:
        found.append(f"README.md: {figures.readme_lines} lines, at most {MOST_README_LINES}")
    return found + [f"an import cycle: {', '.join(cycle)}" for cycle in figures.cycles]


def shown(figures: Figures) -> str:
    """The figures as a Markdown table of one row."""
    columns = {
        "files": f"{len(figures.file_lines)}",
        "lines": f"{sum(figures.file_lines.values()):,}",
        "file med / p90 / max": str(Spread.of(figures.file_lines.values())),
        "function med / p90 / max": str(figures.functions),
        "largest cycle": str(figures.largest_cycle),
        "comment / docstring %": f"{figures.comments:.1f} / {figures.docstrings:.1f}",
        "root: modules + packages": f"{len(figures.root_modules)} + {len(figures.root_packages)}",
        "README lines": str(figures.readme_lines),
    }
    rows = (list(columns), ["---"] * len(columns), list(columns.values()))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def imports(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere: in functions and for types only, too."""
    files = {_module(file.relative_to(root)): file for file in (root / PACKAGE).rglob("*.py")}
    return {name: {target for target in _imported(name, file, files) if target != name} for name, file in files.items()}


def cycles(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """Groups of modules that reach each other, the largest first (strongly connected components)."""
    reached = {name: _reached(name, graph) for name in graph}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return tuple(sorted(groups, key=lambda group: (-len(group), group)))


def _reached(start: str, graph: Graph) -> set[str]:
    """Modules that `start` imports, directly or through others."""
    found: set[str] = set()
    ahead = [start]
    while ahead:
        for name in graph[ahead.pop()] - found:
            found.add(name)
            ahead.append(name)
    return found


def _module(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(name: str, file: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    """`from a import b` is an import of a.b where that is a module, else of a."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, name, is_package=file.stem == "__init__")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield from [target for target in (inner, base) if target in modules][:1]


def _base(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    """What an import is from, with the dots of a relative one resolved."""
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    parents = parts[: len(parts) - node.level + is_package]
    return ".".join([*parents, node.module] if node.module else parents)


def _function_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def _comments(text: str) -> int:
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))


def _docstring_lines(tree: ast.Module) -> int:
    """Of every text that stands as a statement: docstrings, and those below attributes."""
    return sum(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
