"""The figures of small trees, and what the check says of a tree that is over its budget."""

import json
from pathlib import Path

import pytest

from tools import measure_code
from tools.measure_code import Tree

CODE = 'def f(a, b):\n    """Say what it does."""\n    return f"{a:>{b}}" + g(a, b)\n'
LAID_OUT = (
    'def f(\n    a,\n    b,\n):\n    # why\n\n    return f"{a:>{b}}" + g(\n        a, b\n    )\n'
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def measured(root: Path, files: dict[str, str]) -> dict[str, float]:
    return measure_code.figures(Tree(write(root, files)))


def test_each_figure_has_one_limit(tmp_path: Path) -> None:
    budget = json.loads(measure_code.BUDGET.read_text())
    assert list(measured(tmp_path, {"olora_ray/a/one.py": CODE})) == list(budget)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("olora_ray/a/one.py", "nodes of package and pipelines"),
        ("pipelines/one.py", "nodes of package and pipelines"),
        ("olora_ray/contrib/one.py", "nodes of contrib"),
        ("pipelines/contrib/a/one.py", "nodes of contrib"),
        ("tests/a/test_one.py", "nodes of tests"),
        ("tests/contrib/test_one.py", "nodes of tests of contrib"),
    ],
)
@pytest.mark.parametrize("text", [CODE, LAID_OUT])
def test_code_counts_once_and_the_same_in_each_layout(
    tmp_path: Path, file: str, name: str, text: str
) -> None:
    # Module, function and its arguments: 5. Return: 1. Sum: 2. Text: 7. Call: 4.
    found = measured(tmp_path, {file: text})
    sizes = {key: value for key, value in found.items() if key.startswith("nodes of")}
    assert sizes.pop(name) == 19
    assert set(sizes.values()) == {0}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("x = 1 if y else 2\n", "conditional expressions"),
        ("a, b = c, d\n", "packed assignments"),
        ("f(x := 1)\n", "assignment expressions"),
        ("x = [a for b in c for a in b]\n", "nested comprehensions"),
        ("x = [{a for a in b} for b in c]\n", "nested comprehensions"),
        ("x = ' s' * (n > 1)\n", "texts times a condition"),
        ("x = bool(y) * [1]\n", "texts times a condition"),
        ("def _f():\n    pass\n_f()\n", "private functions called once"),
        ("def _f():\n    a, b = _f()\nx = [a for a in b] * n\n_f()\n", None),
    ],
)
def test_each_dense_form_has_its_figure(tmp_path: Path, text: str, name: str | None) -> None:
    found = measured(tmp_path, {"olora_ray/a/one.py": text})
    dense = {key for key, value in found.items() if key.endswith("10,000 nodes") and value}
    assert dense == ({f"{name} per 10,000 nodes"} if name else set())


@pytest.mark.parametrize(
    ("files", "name", "value"),
    [
        (
            {"benchmarks/a.py": '"""Doc.\n\nMore.\n"""\n\n# why\nx = """\n# text\n\n"""\n'},
            "lines of code in benchmarks",
            4,
        ),
        (
            {"olora_ray/a/b.py": f'"""{"d" * 110}"""\n# {"c" * 110}\nx = "{"x" * 110}"\ny = 1\n'},
            "lines over 100 columns per 1,000 lines",
            500,
        ),
        (
            {"tests/a.py": "one._b\nself._b\nos._exit\none.__dict__\n"},
            "private names in tests",
            1,
        ),
        (
            {
                "olora_ray/a/b.py": "import ray._private.x\ndef _a():\n    ray._b, c._a, super()._a\n",
                "olora_ray/a/c.py": "d._e\n",
            },
            "private names where Ray is imported",
            3,
        ),
        (
            {
                "olora_ray/a/b.py": "X = Y = 1\n",
                "olora_ray/a/c.py": "from olora_ray.a import b\nb.Z\n",
                "olora_ray/d/e.py": "from olora_ray.a import b\nfrom olora_ray.a.b import Y\nb.X\n",
            },
            "names that cross packages",
            2,
        ),
        ({"docs/a.md": "one two", "docs/generated/b.md": "three"}, "words in docs", 2),
    ],
)
def test_the_other_figures(tmp_path: Path, files: dict[str, str], name: str, value: float) -> None:
    assert measured(tmp_path, files)[name] == value


def test_a_figure_above_its_limit_says_how_the_limit_is_raised() -> None:
    name = "nodes of package and pipelines"
    budget = {name: 220_000, "private names in tests": 40, "nodes per statement": 9.4}
    figures = {name: 220_412, "private names in tests": 40, "nodes per statement": 9.51}
    nodes, density = measure_code.over_limit(figures, budget)
    assert nodes.startswith(f"{name}: 220412, at most 220000.")
    assert "raise the limit to 220500 in tools/code_budget.json" in nodes
    assert nodes.endswith(f"Budget: +500 {name}, #ISSUE")
    assert density.endswith("Budget: +0.11 nodes per statement, #ISSUE")


def test_the_check_fails_for_a_module_in_the_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path, {"olora_ray/__main__.py": "", "olora_ray/a/one.py": "x = 1\n"})
    assert measure_code.main([str(root), "--check"]) == 0
    write(tmp_path, {"olora_ray/two.py": ""})
    assert measure_code.main([str(root), "--check"]) == 1
    assert capsys.readouterr().err.startswith("olora_ray/two.py: a module in the root")


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
    with pytest.raises(SystemExit) as stopped:
        measure_code.main([str(root), "--check"])
    assert "olora_ray.a.one, olora_ray.b.two" in str(stopped.value)
