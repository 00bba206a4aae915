"""The scripts of pipelines/contrib/evidence, which find each other as when one of them is run; and tiny wheels."""

import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[3] / "pipelines" / "contrib" / "evidence"
MODULES = ("row_files", "wheels", "scorers", "make_reasoning", "library_functions")

GENERATOR = """
import re
from random import Random
from reasoning_gym.factory import register_dataset

tasks_ok = [0, 3, 5, 8]

class GSMSymbolicDatasetConfig:
    def __init__(self, seed, size):
        self.seed, self.size = seed, size

class GSMSymbolicDataset:
    def __init__(self, config):
        self.config = config
        self.task_indices = Random(config.seed).choices(tasks_ok, k=config.size)

    def __getitem__(self, index):
        rng = Random(self.config.seed + index)
        name, a, b = rng.choice(["Ann", "Bo", "Cy"]), rng.randint(1, 40), rng.randint(1, 40)
        total = a - b if self.task_indices[index] == 8 else a + b
        solution = f"{name} has {a} and {b}, {total} in all.\\n#### {total}"
        question = f"Case {self.task_indices[index]}: {name} has {a} and {b}. How many?"
        return {"question": question, "answer": str(total), "metadata": {"answer_cot": solution}}

    def score_answer(self, answer, entry):
        found = re.search(r"\\b-?\\d+", answer)  # as in the package: the sign is lost
        return 1.0 if float(found.group(0)) == float(entry["answer"]) else 0.01

register_dataset(GSMSymbolicDataset)
"""

PACKAGE = {
    "reasoning_gym/__init__.py": "import a_package_that_is_not_there\n",
    "reasoning_gym/factory.py": "from .coaching import name\ndef register_dataset(kind): pass\n",
    "reasoning_gym/coaching/__init__.py": "from .base import name\nfrom .experiment import later\n",
    "reasoning_gym/coaching/base.py": "name = 'coaching'\n",
    "reasoning_gym/coaching/experiment.py": "from ..factory import register_dataset\nlater = 1\n",
    "reasoning_gym/arithmetic/__init__.py": "import a_package_that_is_not_there\n",
    "reasoning_gym/arithmetic/gsm_symbolic/__init__.py": "",
    "reasoning_gym/arithmetic/gsm_symbolic/gsm_symbolic.py": GENERATOR,
}
"""A package whose modules import each other as reasoning-gym's do."""


def make_wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="package")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """A module of pipelines/contrib/evidence by its name."""
    sys.path.insert(0, str(SCRIPTS))
    yield import_module
    sys.path.remove(str(SCRIPTS))
    for name in [
        *MODULES,
        *(name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"),
    ]:
        sys.modules.pop(name, None)
