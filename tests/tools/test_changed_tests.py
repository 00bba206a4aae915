from pathlib import Path

import pytest

from tests.tools.test_measure_code import write
from tools.changed_tests import EVERYTHING
from tools.changed_tests import tests_of as folders
from tools.measure_code import Tree


@pytest.mark.parametrize(
    ("files", "run"),
    [
        (["olora_ray/data/reader.py"], ["tests/data", "tests/tokens"]),
        (["olora_ray/tokens/store.py", "tests/train/helper.py"], ["tests/tokens", "tests/train"]),
        (["docs/page.md", "README.md"], ["tests/docs"]),
        (["pipelines/contrib/places/report.py"], ["tests/contrib/places", "tests/docs"]),
        (["tests/contrib/places/test_report.py"], ["tests/contrib/places", "tests/docs"]),
        (["tests/train/test_loop.py", "tests/tiny.py"], EVERYTHING),
        (["pyproject.toml"], EVERYTHING),
        ([], EVERYTHING),
    ],
)
def test_a_change_runs_the_tests_of_its_package_and_of_its_importers(
    tmp_path: Path, files: list[str], run: list[str]
) -> None:
    code = {
        "olora_ray/data/reader.py": "",
        "olora_ray/tokens/store.py": "from olora_ray.data import reader\n",
        "olora_ray/train/loop.py": "from olora_ray.tokens import store\n",
    }
    packages = ("data", "tokens", "train", "docs", "contrib/places")
    tests = {f"tests/{name}/__init__.py": "" for name in packages}
    assert folders(files, Tree(write(tmp_path, code | tests))) == run
