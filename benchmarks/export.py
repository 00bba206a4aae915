"""Time and memory of an export, its merge and its checks, beside a plain copy of the model's file.

The model is a random Llama of 1.2 billion parameters in bfloat16, written weight by weight, with a random adapter on
all linear layers. Neither the benchmark nor the export holds the complete model in memory; the peak is in the table.

    python benchmarks/export.py [--rank 16] [--folder /tmp/olora-export-benchmark] [--layers 16]
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, table

from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.load import build
from olora_ray.model import stored
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import export_preflight, merge
from olora_ray.pipeline.parity import check_adapter
from olora_ray.pipeline.peft_folder import write_adapter

GIB = 2**30
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=16, help="16 are 1.2 billion parameters")
    parser.add_argument("--folder", help="folder for 8 GB, deleted afterwards")
    args = parser.parse_args()
    quiet_transformers()
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="olora-export-") as folder:
        measure(Path(folder), args.rank, args.layers)


def measure(folder: Path, rank: int, layers: int) -> None:
    base = folder / "base"
    count = write_base(base, num_hidden_layers=layers)
    os.sync()  # what is still to be written of it is not the copy's
    config = build(
        {
            "run": {"name": "benchmark"},
            "model": {"name": str(base)},
            "data": {"train": [{"path": "unused.jsonl"}]},
            "adapter": {"rank": rank, "alpha": rank},
        }
    )
    found, scale = BaseModel(str(base), str(base), ""), config.adapter.scale()
    model = skeleton(found, config.model)
    adapter = random_adapter(model, rank)
    groups = stored.groups(base, model, adapter)
    rows = [
        timed("copy of the file", lambda: copy(base / "model.safetensors", folder / "copy")),
        timed(
            "trial before step 0",
            lambda: require(not export_preflight.problems(found, config, adapter)),
        ),
        timed(
            "adapter folder",
            lambda: write_adapter(adapter, config.adapter, "base", folder / "adapter", model),
        ),
        timed(
            "merge, with its copy", lambda: merged(base, adapter, scale, folder / "merged", model)
        ),
        timed(
            "merged weights against base + change",
            lambda: require(
                merge.check_weights(base, folder / "merged", groups, adapter, scale).error <= 1
            ),
        ),
        timed(
            "all other bytes", lambda: require(not merge.changed(base, folder / "merged", groups))
        ),
        timed(
            "adapter in PEFT",
            lambda: require(check_adapter(folder / "adapter", model, adapter, scale).ok),
        ),
    ]
    seconds = [row[1] for row in rows]
    rows.append(("all but copy and trial", sum(seconds[2:]), peak()))
    size = (base / "model.safetensors").stat().st_size / GIB
    print(f"{count / 1e9:.2f} billion parameters, {size:.2f} GiB; rank {rank}")
    print(
        table(
            ("step", "seconds", "times the copy", "peak GiB"),
            [
                (name, f"{each:.1f}", f"{each / seconds[0]:.1f}", f"{most:.2f}")
                for name, each, most in rows
            ],
        )
    )


def write_base(folder: Path, **shape: int) -> int:
    """Write a random model with the shape of Llama 3.2 1B; return its number of parameters."""
    from transformers import LlamaConfig

    told: dict[str, Any] = LLAMA_1B | shape
    LlamaConfig(
        **told, tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    ).save_pretrained(folder)
    config = build(
        {
            "run": {"name": "a"},
            "model": {"name": str(folder)},
            "data": {"train": [{"path": "a.jsonl"}]},
        }
    )
    shapes = {
        name: part.shape
        for name, part in skeleton(BaseModel(str(folder), str(folder), ""), config.model)
        .state_dict()
        .items()
        if name != "lm_head.weight"
    }
    header: dict[str, Any] = {}
    place = 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [place, place + 2 * shape.numel()],
        }
        place += 2 * shape.numel()
    text, generator = json.dumps(header).encode(), torch.Generator().manual_seed(0)
    text += b" " * (
        -len(text) % 8
    )  # as safetensors writes it: numbers begin at multiples of their size
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for rows in torch.empty(shape, device="meta").split(8192):
                part = (
                    torch.randn(rows.shape, generator=generator, dtype=torch.float32)
                    .mul_(0.02)
                    .bfloat16()
                )
                file.write(part.view(torch.int16).numpy().tobytes())
    return place // 2


def random_adapter(model: Any, rank: int) -> dict[str, AdapterWeights]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            m, n = module.weight.shape
            a0, b0 = (
                torch.randn(rank, n, generator=generator),
                torch.randn(m, rank, generator=generator) / m**0.5,
            )
            da, db = (
                torch.randn(rank, n, generator=generator),
                torch.randn(m, rank, generator=generator),
            )
            found[name] = AdapterWeights(Factors(a0 * 0.1, b0), da * 1e-3, db * 1e-3)
    return found


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    flush(target)


def merged(
    base: Path, adapter: dict[str, AdapterWeights], scale: float, target: Path, model: Any
) -> None:
    merge.write_merged(base, adapter, scale, target, model)
    for file in target.iterdir():
        flush(file)


def flush(target: Path) -> None:
    """Wait until a file is on the disk, because a copy in the page cache would look too fast."""
    with target.open("rb") as file:
        os.fsync(file.fileno())


def timed(name: str, work: Callable[[], object]) -> tuple[str, float, float]:
    """Return (name, seconds, peak memory so far in GiB)."""
    start = time.perf_counter()
    work()
    return name, time.perf_counter() - start, peak()


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def require(right: bool) -> None:
    if not right:
        raise SystemExit("the export has failed its checks")


if __name__ == "__main__":
    main()
