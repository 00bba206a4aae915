"""A checkpoint: with other bytes, or resealed with another state, other tensors or another manifest."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from olora_ray.common import storage
from olora_ray.train import checkpoint
from tests.fuzz import mutate
from tests.fuzz.case import Case
from tests.train import test_checkpoint

FILES = test_checkpoint.FILES


def prepare(place: Path) -> dict[str, bytes]:
    """The files of a good one."""
    test_checkpoint.save(place / "saved")
    return {name: (place / "saved" / name).read_bytes() for name in FILES}


def cases(seed: int, made: dict[str, bytes]) -> Iterator[Case]:
    """A changed file must be refused; a resealed one is read, or refused."""
    for number in range(10**9):
        random = Random(f"checkpoint {seed} {number}")
        name = random.choice(FILES)
        if number % 2:
            content = mutate.raw(random, made[name])
            same = content == made[name] or (name == "manifest.json" and _json(content) == _json(made[name]))
            yield Case((name, content, False), refuse=not same)
        elif name.endswith(".json"):
            yield Case((name, mutate.as_json(mutate.tree(random, json.loads(made[name])), random).encode(), True))
        else:
            yield Case((name, mutate.raw(random, made[name], front=random.choice([None, 16, 400])), True))


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def read(content: tuple[str, bytes, bool], place: Path, made: dict[str, bytes]) -> None:
    """As a training that resumes does."""
    name, changed, reseal = content
    folder = place / "read"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for each, whole in made.items():
        (folder / each).write_bytes(changed if each == name else whole)
    if reseal and name != "manifest.json":
        manifest = json.loads(made["manifest.json"])
        manifest["files"][name] = storage.size_and_digest(folder / name)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    found = checkpoint.load(folder)
    found.best_adapter()
    checkpoint.require_same(found.identity, found.identity, str(folder))
