"""A config file."""

import copy
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

from olora_ray.config.load import build, dump, flatten, load_config, parse_yaml
from tests.fuzz import mutate
from tests.fuzz.case import Case, agree

ROOT = Path(__file__).parents[3]
SHIPPED = [file.read_text() for file in sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))]
TREES: list[Any] = [yaml.safe_load(text) for text in SHIPPED]
SNIPPETS = [
    *(
        "2026-13-45",
        "0b_",
        "!!int x",
        "!!timestamp z",
        "!!set {x}",
        "!!binary eA==",
        "9" * 5000,
        "0x" + "f" * 5000,
        "[" * 600,
    ),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "*a",
        ".inf",
        "-.inf",
        ".nan",
        "1e999",
        "1_0",
        "1:30",
        "on",
        "~",
        "''",
        "!!python/name:os.x",
        "<<",
    ),
    *(
        '"\\ud800"',
        '"\\0"',
        "'a\n\n  b'",
        "|\n  x",
        "{? [a] : b}",
        "1e-4",
        "0o7",
        "2026-01-01",
        "https://a:b@c",
        "x" * 10_000,
    ),
]
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def cases(seed: int, made: Any) -> Iterator[Case]:
    """Trees with other values, texts with other letters, values that YAML cannot make, keys that come twice."""
    for number in range(10**9):
        random = Random(f"config {seed} {number}")
        original = random.randrange(len(SHIPPED))
        match number % 8:
            case 0 | 1:
                yield Case(mutate.as_yaml(mutate.tree(random, TREES[original])))
            case 2:
                yield Case(mutate.as_json(mutate.tree(random, TREES[original])))
            case 3:
                yield Case(mutate.text(random, SHIPPED[original]))
            case 4:
                yield Case(mutate.raw(random, SHIPPED[original].encode()))
            case 5:
                yield Case(_replaced(random, TREES[original], random.choice(SNIPPETS)))
            case 6:
                section = random.choice(list(TREES[original]))
                again = {section: copy.deepcopy(TREES[original][section])}
                yield Case(yaml.dump(TREES[original]) + yaml.dump(again), refuse=True)
            case _:
                yield Case(
                    yaml.dump(TREES[original])
                    + random.choice([LAUGHS, f"x: {random.choice(SNIPPETS)}\n"]),
                    refuse=True,
                )


def _replaced(random: Random, tree: Any, snippet: str) -> str:
    """The tree as YAML with one value, or key, written as the snippet."""
    tree = copy.deepcopy(tree)
    node, key = random.choice(mutate.places(tree))
    if isinstance(node, dict) and random.random() < 0.2:
        node["PLACE"] = node.pop(key)
    else:
        node[key] = "PLACE"
    return yaml.dump(tree, default_flow_style=True, width=10**9).replace("PLACE", snippet)


def read(content: str | bytes, place: Path, made: Any) -> None:
    """As an entry script does; what is read is written and read again."""
    file = place / "run.yaml"
    file.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    config = load_config(file)
    agree(build(parse_yaml(dump(config), "dump")), config, "what was written is read as")
    flatten(config)
