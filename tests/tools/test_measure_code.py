"""The tree stays within its limits, and the measure finds what is beyond them."""

from pathlib import Path

import pytest

from tools import measure_code
from tools.measure_code import Figures, Spread

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def here() -> Figures:
    return measure_code.measure(ROOT)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_all_modules_of_the_tree_lie_in_few_packages(here: Figures) -> None:
    assert here.root_modules == ()
    assert 8 <= len(here.root_packages) <= measure_code.MOST_PACKAGES


def test_no_file_of_the_tree_is_long_and_no_imports_go_round(here: Figures) -> None:
    assert len(here.file_lines) > 100
    assert [problem for problem in measure_code.problems(here) if not problem.startswith("README.md")] == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from olora_ray.b import two\n", "import olora_ray.a.one\n"),
        ("def f():\n    from olora_ray.b.two import x\n", "from olora_ray.a import one\n"),
        ("if TYPE_CHECKING:\n    import olora_ray.b.two\n", "from olora_ray.a.one import X\n"),
        ("from ..b import two\n", "def f():\n    from ..a.one import x\n"),
    ],
)
def test_imports_that_go_round_are_found_wherever_they_stand(tmp_path: Path, first: str, second: str) -> None:
    root = write(tmp_path, {"olora_ray/a/one.py": first, "olora_ray/b/two.py": second, "olora_ray/b/__init__.py": ""})
    figures = measure_code.measure(root)
    assert figures.cycles == (("olora_ray.a.one", "olora_ray.b.two"),)
    assert figures.largest_cycle == 2


def test_a_package_and_its_modules_are_told_apart(tmp_path: Path) -> None:
    # The package imports its module with a dot; the module imports another package's name, and nothing goes round.
    files = {
        "olora_ray/a/__init__.py": "from . import one\nfrom .one import x\n",
        "olora_ray/a/one.py": "from olora_ray.b import NAME\nimport os.path\n",
        "olora_ray/b/__init__.py": "NAME = 1\n",
    }
    root = write(tmp_path, files)
    assert measure_code.imports(root) == {
        "olora_ray.a": {"olora_ray.a.one"},
        "olora_ray.a.one": {"olora_ray.b"},
        "olora_ray.b": set(),
    }
    assert measure_code.measure(root).largest_cycle == 1


def test_a_circle_of_three_is_one_cycle_and_what_hangs_on_it_none() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set[str]()}
    assert measure_code.cycles(graph) == (("a", "b", "c"),)


def test_check_names_whatever_is_over_its_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine = {
        "olora_ray/a/one.py": "import olora_ray.a.two\n",
        "olora_ray/a/two.py": "X = 1\n",
        "README.md": "hi\n" * 200,
    }
    fine["olora_ray/a/long.py"] = "Y = 2\n" * 600
    root = write(tmp_path, fine)
    assert measure_code.main([str(root), "--check"]) == 0
    write(root, {"olora_ray/__init__.py": "", "olora_ray/stray.py": "", "README.md": "hi\n" * 201})
    write(root, {"olora_ray/a/long.py": "Y = 2\n" * 351, "olora_ray/a/two.py": "import olora_ray.a.one\n"})
    write(root, {f"olora_ray/p{number}/__init__.py": "" for number in range(13)})
    capsys.readouterr()
    assert measure_code.main([str(root)]) == 0  # only shown
    assert measure_code.main([str(root), "--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "olora_ray/stray.py: a module in the root: give it a package",
        "olora_ray: 14 packages in the root, at most 13",
        "olora_ray/a/long.py: 601 lines, at most 600",
        "README.md: 201 lines, at most 200",
        "an import cycle: olora_ray.a.one, olora_ray.a.two",
    ]


def test_the_figures_of_a_small_tree(tmp_path: Path) -> None:
    text = '"""About."""\n\nA = 1  # why\n"""Of an\nattribute."""\n\n\ndef f():\n    # "text"\n    return "# none"\n'
    root = write(tmp_path, {"olora_ray/a/one.py": text, "olora_ray/a/__init__.py": "\n"})
    figures = measure_code.measure(root)
    assert figures.file_lines == {"olora_ray/a/one.py": 10}
    assert figures.functions == Spread(3, 3, 3)
    assert (figures.comments, figures.docstrings) == (100 * 2 / 7, 100 * 3 / 7)
    expected = "| 1 | 10 | 10 / 10 / 10 | 3 / 3 / 3 | 1 | 28.6 / 42.9 | 0 + 1 | 0 |"
    assert measure_code.shown(figures).splitlines()[-1] == expected


def test_the_spread_of_lengths() -> None:
    assert Spread.of(range(1, 11)) == Spread(5.5, 10, 10)
    assert Spread.of([]) == Spread(0, 0, 0)
