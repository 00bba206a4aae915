"""The tree stays within its budget, and the measure finds what is beyond it."""

import json
from pathlib import Path

import pytest

from tools import measure_code
from tools.measure_code import Tree

ROOT = Path(__file__).parents[2]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_tree_is_within_its_budget() -> None:
    budget = json.loads(measure_code.BUDGET.read_text())
    tree = Tree(ROOT)
    assert set(budget) <= set(measure_code.figures(tree))
    assert len(tree.filled) > 100
    assert measure_code.problems(tree, budget) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from olora_ray.b import two\n", "import olora_ray.a.one\n"),
        ("def f():\n    from olora_ray.b.two import x\n", "from olora_ray.a import one\n"),
        ("if TYPE_CHECKING:\n    import olora_ray.b.two\n", "from olora_ray.a.one import X\n"),
    ],
)
def test_imports_that_go_round_are_found_wherever_they_stand(tmp_path: Path, first: str, second: str) -> None:
    root = write(tmp_path, {"olora_ray/a/one.py": first, "olora_ray/b/two.py": second, "olora_ray/b/__init__.py": ""})
    assert measure_code.problems(Tree(root), {}) == ["an import cycle: olora_ray.a.one, olora_ray.b.two"]


def test_a_package_and_its_modules_are_told_apart(tmp_path: Path) -> None:
    files = {
        "olora_ray/a/__init__.py": "from olora_ray.a import one\nfrom olora_ray.a.one import x\n",
        "olora_ray/a/one.py": "from olora_ray.b import NAME\nimport os.path\n",
        "olora_ray/b/__init__.py": "NAME = 1\n",
    }
    tree = Tree(write(tmp_path, files))
    assert tree.imports == {
        "olora_ray.a": {"olora_ray.a.one"},
        "olora_ray.a.one": {"olora_ray.b"},
        "olora_ray.b": set(),
    }
    assert measure_code.longest_chain(tree.imports) == 3


def test_a_circle_of_three_is_one_cycle_and_what_hangs_on_it_none() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set[str]()}
    assert measure_code.cycles(graph) == [("a", "b", "c")]


def test_check_names_whatever_is_over_its_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"olora_ray/a/one.py": "import olora_ray.a.two\n", "olora_ray/a/two.py": "X = 1\n"})
    write(tmp_path, {"README.md": "hi\n" * 200, "olora_ray/__main__.py": "", "olora_ray/a/long.py": "y = 2\n" * 600})
    assert measure_code.main([str(tmp_path), "--check"]) == 0
    write(tmp_path, {"olora_ray/stray.py": "", "README.md": "hi\n" * 201, "olora_ray/a/long.py": "y = 2\n" * 601})
    write(tmp_path, {"olora_ray/a/two.py": "import olora_ray.a.one\n"})
    capsys.readouterr()
    assert measure_code.main([str(tmp_path)]) == 0  # only shown
    assert measure_code.main([str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "olora_ray/stray.py: a module in the root: give it a package",
        "longest file, lines: 601, at most 600",
        "lines of README: 201, at most 200",
        "an import cycle: olora_ray.a.one, olora_ray.a.two",
    ]


def test_the_figures_of_a_small_tree(tmp_path: Path) -> None:
    text = (
        '"""About."""\n\nSIZE = 2**20 - 1  # why\n"""Of an\nattribute."""\nNAME = "a"\n\n\n'
        'def f():\n    # a comment\n    return "# none"\n'
    )
    test = "def test(monkeypatch):\n    monkeypatch.setattr(a, 'b', c._inside)\n    os._exit(0)\n"
    files = {
        "olora_ray/a/one.py": text,
        "olora_ray/a/two.py": "import olora_ray.a.one\nfrom ray._private import worker\n",
        "olora_ray/b/three.py": "from olora_ray.a import two\nfrom olora_ray.a.one import f\n\ntwo.worker\n",
        "pipelines/recipe.py": "try:\n    f()\nexcept OSError:\n    pass\n",
        "olora_ray/b/__init__.py": "\n",
        "tests/test_a.py": test,
        "docs/page.md": "# A page\n",
        "docs/generated/table.md": "two words\n",
    }
    assert measure_code.figures(Tree(write(tmp_path, files))) == {
        "lines of code in package and pipelines": 13,
        "modules in the package": 3,
        "longest file, lines": 11,
        "modules that other packages import": 2,
        "modules with one importer, in the same folder": 0,
        "longest import chain": 3,
        "numeric constants of modules": 1,
        "uses of Ray's private modules": 1,
        "names that cross packages": 2,
        "except clauses": 0,
        "setattr of any kind in tests": 1,
        "private names in tests": 1,
        "lines of tests": 3,
        "lines of README": 0,
        "words of docs": 3,
        "words of docs with generated pages": 5,
        "docstrings": 1,
        "lines of comments": 1,
    }
