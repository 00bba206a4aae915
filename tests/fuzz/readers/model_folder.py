"""A model folder, from its name to a loaded model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch

from olora_ray.data.formats import to_example
from olora_ray.data.tokenize import ExampleTokenizer
from olora_ray.data.tokenizer_spec import spec_from_pretrained
from olora_ray.model import load, source
from olora_ray.train.estimate import estimate
from tests import tiny
from tests.fuzz import mutate
from tests.pipelines import project
from tests.tokens import helpers

INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")


def prepare(place: Path) -> dict[str, bytes]:
    """The files of a small model with an index."""
    folder = project.make_model(place / "good", layers=1)
    names = _names((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(
        json.dumps(
            {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        )
    )
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def _names(weights: bytes) -> list[str]:
    return [
        name
        for name in json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
        if name != "__metadata__"
    ]


def warm(place: Path, made: dict[str, bytes]) -> None:
    """Let all be imported."""
    read(("config.json", made["config.json"]), place, made)


def cases(seed: int, made: dict[str, bytes]) -> Iterator[tuple[str, bytes | None]]:
    """A file with other values, other bytes or gone; headers of weights with other numbers."""
    for number in range(10**9):
        random = Random(f"model folder {seed} {number}")
        name = random.choice([*made, "config.json", "config.json", INDEX])
        content = made[name]
        if name.endswith(".safetensors"):
            yield name, _weights(random, content)
        elif name.endswith(".json") and random.random() < 0.75:
            yield name, mutate.as_json(mutate.tree(random, json.loads(content)), random).encode()
        else:
            yield name, None if random.random() < 0.2 else mutate.raw(random, content)


def _weights(random: Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if random.random() < 0.5:
        return mutate.raw(random, content, front=random.choice([8, 8 + length]))
    header = mutate.as_json(
        mutate.tree(random, json.loads(content[8 : 8 + length])), random
    ).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def read(content: tuple[str, bytes | None], place: Path, made: dict[str, bytes]) -> None:
    """As a run does: find it, its tokenizer, its size, the model itself."""
    name, changed = content
    folder = place / "read"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for each, whole in made.items():
        if each != name:
            (folder / each).write_bytes(whole)
        elif changed is not None:
            (folder / each).write_bytes(changed)
    config = tiny.config(
        model__name=str(folder), model__dtype="float32", run__storage=str(place / "runs")
    )
    base = source.obtain(config)
    tokenizer = load.load_tokenizer(base, config.model)
    spec = spec_from_pretrained(tokenizer, base.name)
    load.end_tokens(base, tokenizer)
    estimate(tiny.decided(config), base, tiny.ON_CPU)
    load.load_model(base.folder, config.model, CPU)
    ExampleTokenizer(spec, 256)(to_example("messages", helpers.chat("who?", "me"), {}))
