"""Prints the folders of tests that make quick runs: of the packages that differ from main, and of their importers.

python tools/changed_tests.py [ROOT]

An importer imports a changed module itself. All tests run where nothing differs, and where something differs that is
no package's own, such as pyproject.toml or a helper of all tests. The tests of an application of pipelines/contrib run
where it or its tests differ.
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

sys.path.append(str(Path(__file__).parents[1]))

from tools.measure_code import PACKAGE, ROOT, Tree

EVERYTHING = ["tests", "--ignore=tests/contrib"]
# No test depends on them but those of docs and tools.
PROSE = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile"}


def main(root: Path) -> None:
    print(*tests_of(changed(root), Tree(root)))


def changed(root: Path) -> list[str]:
    """Return the files that differ from the commit at which the branch left main, and those that git does not know."""
    base = _git(root, "merge-base", "HEAD", "main") or ["HEAD"]
    return _git(root, "diff", "--name-only", *base) + _git(
        root, "ls-files", "--others", "--exclude-standard"
    )


def tests_of(files: Iterable[str], tree: Tree) -> list[str]:
    folders = {folder for file in files for folder in _folders(PurePath(file), tree)}
    if not folders or "tests" in folders:
        return EVERYTHING
    return sorted(name for name in folders if (tree.root / name).is_dir())


def _folders(file: PurePath, tree: Tree) -> Iterator[str]:
    first, *rest = file.parts
    if first == PACKAGE:
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        for name in {module} | tree.users.get(module, set()):
            yield f"tests/{name.split('.')[1]}" if "." in name else "tests"
    elif rest[:1] == ["contrib"]:
        yield from ("tests/docs", "tests/tools", f"tests/contrib/{rest[1]}")
    elif first == "tests":
        yield f"tests/{rest[0]}" if len(rest) > 1 else "tests"
    elif rest or first in PROSE:
        yield from ("tests/docs", "tests/tools", f"tests/{first}")
    else:
        yield "tests"


def _git(root: Path, *arguments: str) -> list[str]:
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True
    ).stdout.splitlines()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
