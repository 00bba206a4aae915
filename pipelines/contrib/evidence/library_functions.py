"""Documented functions of Python libraries, read from the source in their wheels.

Each function belongs to one of two tasks, by a digest of its source: to write its body, or to write its docstring. Each
file is held out or trained on as a whole, by a digest of its path.
"""

import ast
import hashlib
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from wheels import Wheel

LIBRARIES = (
    Wheel(
        "sympy",
        "1.13.3",
        "54612cf55a62755ee71824ce692986f23c88ffa77207b30c1368eda4a7060f73",
        "BSD-3-Clause",
    ),
    Wheel(
        "Django",
        "5.1.4",
        "236e023f021f5ce7dee5779de7b286565fdea5f4ab86bae5338e3f7b69896cf0",
        "BSD-3-Clause",
    ),
    Wheel(
        "networkx",
        "3.4.2",
        "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
        "BSD-3-Clause",
    ),
)
SUMMARY_CHARACTERS = range(30, 301)
BODY_CHARACTERS = range(60, 401)
HELD_OUT_FILES = 10
"""One file of so many is held out."""


@dataclass(frozen=True)
class Function:
    signature: str
    summary: str
    """The first paragraph of the docstring, as one line."""
    body: str

    def digest(self) -> int:
        return _digest(f"{self.signature}\n{self.summary}\n{self.body}")

    def body_row(self) -> tuple[str, str]:
        """Return (question, answer): what the function is for, and its body."""
        asked = f'{self.signature}\n    """{self.summary}"""\nWrite the body of this function.'
        return asked, self.body

    def docstring_row(self) -> tuple[str, str]:
        """Return (question, answer): the function without its docstring, and the docstring."""
        body = textwrap.indent(self.body, "    ")
        return f"{self.signature}\n{body}\nDescribe this function.", self.summary


Rows = list[tuple[str, str]]


def rows_of(wheels: Sequence[Path], *, bodies: bool) -> tuple[Rows, Rows]:
    """Return the held-out rows and the training rows of a task, (question, answer), in the order of their digests."""
    held_out: dict[Function, None] = {}
    training: dict[Function, None] = {}
    for wheel in wheels:
        for file, source in _sources(wheel):
            chosen = held_out if _digest(file) % HELD_OUT_FILES == 0 else training
            chosen.update(dict.fromkeys(functions(source)))
    halves = []
    for found in (held_out, training):
        # A function that several files have is trained on only if no held-out file has it.
        own = [each for each in found if each.digest() % 2 == bodies]
        kept = [each for each in own if found is held_out or each not in held_out]
        kept.sort(key=Function.digest)
        halves.append([each.body_row() if bodies else each.docstring_row() for each in kept])
    return halves[0], halves[1]


def functions(source: str) -> Iterator[Function]:
    """Yield the functions and methods whose docstring and body have a fitting length."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node) or ""
        summary = " ".join(docstring.split("\n\n")[0].split())
        first = node.body[0]
        signature = "".join(lines[node.lineno - 1 : first.lineno - 1])
        body = "".join(lines[first.end_lineno : node.end_lineno])
        found = Function(_flush_left(signature), summary, _flush_left(body))
        if len(summary) in SUMMARY_CHARACTERS and len(found.body) in BODY_CHARACTERS:
            yield found


def _flush_left(code: str) -> str:
    return textwrap.dedent(code).strip()


def _sources(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield path and text of each Python file outside of tests."""
    with ZipFile(wheel) as archive:
        for file in archive.namelist():
            if file.endswith(".py") and "/tests/" not in file:
                yield file, archive.read(file).decode()


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
