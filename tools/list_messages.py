"""Prints every message that users may see, so that a person can read all of them as one text.

    python tools/list_messages.py [FOLDER ...]        (default: olora_ray pipelines)

Prints, per module, each string literal of three or more words with its line; fields of f-strings stay in braces.
Docstrings are left out, except those below the fields of a config, which are the help of settings.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "olora_ray/config/schema.py",
    "olora_ray/config/nights.py",
    "olora_ray/sweep/space.py",
    "pipelines/contrib/comparison/arguments.py",
)


def main(argv: Sequence[str]) -> None:
    for folder in argv or ("olora_ray", "pipelines"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            lines = sorted(
                messages(file.read_text(encoding="utf-8"), str(file.relative_to(ROOT)) in SETTINGS)
            )
            if lines:
                print(
                    f"\n## {file.relative_to(ROOT)}",
                    *(f"{line:>4}  {text}" for line, text in lines),
                    sep="\n",
                )


def messages(source: str, with_help: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, text on one line) of each message in the source of a module."""
    left_out: set[ast.AST] = set()
    for node in ast.walk(
        ast.parse(source)
    ):  # breadth first, so a node comes before the literals in it
        if isinstance(node, ast.JoinedStr):
            left_out.update(set(ast.walk(node)) - {node})
        elif isinstance(node, ast.Expr) and not (with_help and node.col_offset == 4):
            left_out.add(node.value)
        words = [] if node in left_out else _text(node).split()
        if len(words) > 2:
            yield getattr(node, "lineno", 0), " ".join(words)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _text(part) or f"{{{ast.unparse(getattr(part, 'value', part))}}}"
            for part in node.values
        )
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


if __name__ == "__main__":
    main(sys.argv[1:])
