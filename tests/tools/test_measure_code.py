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
def test_imports_that_go_round_are_found_wherever_they_stand(
    tmp_path: Path, first: str, second: str
) -> None:
    root = write(
        tmp_path,
        {"olora_ray/a/one.py": first, "olora_ray/b/two.py": second, "olora_ray/b/__init__.py": ""},
    )
    assert measure_code.problems(Tree(root), {}) == [
        "an import cycle: olora_ray.a.one, olora_ray.b.two"
    ]


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
