"""A space file of a search."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

from olora_ray.config.load import load_config, override
from olora_ray.sweep import space_file
from tests.fuzz import mutate
from tests.fuzz.case import Case
from tests.fuzz.readers import config as of_configs

ROOT = Path(__file__).parents[3]
SHIPPED = [file.read_text() for file in sorted((ROOT / "tune_spaces").glob("*.yaml"))]
TREES: list[Any] = [yaml.safe_load(text) for text in SHIPPED]
CONFIG = load_config(ROOT / "pipelines" / "configs" / "quickstart.yaml")
FIELDS = [
    "train.lr",
    "train.clip",
    "train.steps",
    "train.schedule",
    "adapter.rank",
    "adapter.targets",
    "run.name",
    "data.train.0.path",
]
DOMAINS = ["choice", "grid", "uniform", "loguniform", "quniform", "randint", "of", "times"]


def cases(seed: int, made: Any) -> Iterator[Case]:
    """The shipped spaces with other values, and spaces of random domains."""
    for number in range(10**9):
        random = Random(f"space {seed} {number}")
        original = random.randrange(len(SHIPPED))
        match number % 5:
            case 0 | 1:
                yield Case(mutate.as_yaml(mutate.tree(random, TREES[original])))
            case 2:
                yield Case(mutate.text(random, SHIPPED[original]))
            case 3:
                yield Case(
                    of_configs._replaced(
                        random, TREES[original], random.choice(of_configs.SNIPPETS)
                    )
                )
            case _:
                yield Case(yaml.dump({**TREES[original], "search": _search(random)}))


def _search(random: Random) -> dict[str, Any]:
    values = [0, 1, 8, 1e-4, 0.5, None, "cosine", [], "adapter.rank", *mutate.ODD_NUMBERS]
    return {
        random.choice(FIELDS): {
            random.choice(DOMAINS): random.choice(
                [random.choice(values), random.choices(values, k=random.randrange(4))]
            )
            for _ in range(random.choice([1, 1, 2]))
        }
        for _ in range(random.choice([1, 2, 3]))
    }


def read(content: str, place: Path, made: Any) -> None:
    """As `sweep.py` does, and what its first trials would be."""
    file = place / "space.yaml"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    space = space_file.load_space(file, CONFIG)
    for number in range(min(space.count(), 3)):
        override(CONFIG, {**space.set, **space.values(space.drawn(number))})
