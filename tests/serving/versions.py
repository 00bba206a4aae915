"""Versions of adapters of one tiny base model in a real MLflow server; vLLM can serve them on a CPU."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from olora_ray.adapter.inject import find_targets
from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.config.schema import Adapter
from olora_ray.model import folder as model_folder
from olora_ray.tracking import models
from olora_ray.tracking.aliases import CHAMPION, Aliases
from olora_ray.tracking.checksums import GATE
from olora_ray.tracking.models import BaseOfAdapter, Contents
from olora_ray.tracking.start import start_run
from tests import tiny
from tests.export_parts import random_adapter, save_tokenizer
from tests.mlflow_server import Server

NAME = "chats"
FOLLOWED, CHALLENGER = f"{NAME}@{CHAMPION}", f"{NAME}@challenger"


class Versions:
    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        # vLLM's attention on a CPU takes heads of 64 and more.
        self.model = tiny.llama(
            hidden_size=128,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
        )
        self.model.save_pretrained(self.base)
        save_tokenizer(self.base)
        self.server = Server(folder / "mlflow")
        self.server.wait()
        self.aliases = Aliases(self.server.uri, NAME)

    def adapter(self, number: str) -> Path:
        """The folder that was registered as this version."""
        return self.folder / number

    def add(self, rank: int = 4, **of_base: Any) -> str:
        """Register one more version, with other weights; `of_base` changes what it says about its base model."""
        seed = len(list(self.folder.glob("[0-9]*"))) + 1
        settings, folder = Adapter(rank=rank, alpha=2 * rank), self.adapter(str(seed))
        layers = find_targets(self.model, "all-linear", rank)
        weights = {
            name: random_adapter(self.model, name, rank, 100 * seed + i)
            for i, name in enumerate(layers)
        }
        write_adapter(weights, settings, str(self.base), folder, self.model)
        save_tokenizer(folder)
        base = BaseOfAdapter(
            str(self.base), model_folder.of_folder(self.base, code=False), str(self.base)
        )
        return self.register(Contents(folder, replace(base, **of_base)))

    def register(self, contents: Contents) -> str:
        config = tiny.config(run__storage=str(self.folder / "runs"), tracking__uri=self.server.uri)
        return str(models.register(start_run(config, "test", {}), contents, NAME, "challenger", {}))

    def spoil(self, number: str) -> None:
        """Change one bit of a version's weights where MLflow keeps them."""
        run = self.aliases.version(number)
        model = models.of_run(self.server.uri, str(run.run_id))
        (file,) = (self.folder / "mlflow" / "artifacts").rglob(
            f"{model}/artifacts/peft/adapter_model.safetensors"
        )
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    def point(self, number: str, alias: str = CHAMPION) -> None:
        """Set an alias without the checks of a promotion; a champion gets a verdict, so that it may be served."""
        if alias == CHAMPION:
            self.aliases.tag_version(number, GATE, "passed: by test")
        self.aliases.client.set_registered_model_alias(NAME, alias, number)


@contextlib.contextmanager
def registered(folder: Path, number: int) -> Iterator[Versions]:
    """So many versions, the first of which is the champion."""
    found = Versions(folder)
    for _ in range(number):
        found.add()
    found.point("1")
    yield found
    found.server.kill()
