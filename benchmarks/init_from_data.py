"""The row of benchmarks/init.py for EVA, which reads training data, beside PEFT's.

Both sides read the same batch, with rows of one length. One batch, because PEFT's EVA depends on the order of several
batches.
"""

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from common import MemoryStore, table
from torch import Tensor

from olora_ray.adapter.inject import find_targets
from olora_ray.config.schema import Adapter
from olora_ray.tokens.plan import Pack
from olora_ray.train.data_driven import eva_factors
from olora_ray.train.loss import SupervisedLoss

ROWS, LENGTH, PROMPT = 4, 80, 16
"""Size of the batch; the prompt's tokens are not supervised."""
RATIO = 2.0
"""EVA's rho."""
Spaces = dict[str, Tensor]
"""Rows of A by layer."""


class Measure(Protocol):
    seconds: float
    megabytes: float

    def __enter__(self) -> "Measure": ...
    def __exit__(self, *error: object) -> None: ...


def from_data(name: str, make: Callable[[], Any], rank: int, watch: Callable[[], Measure]) -> str:
    """Return the table; `make` returns the same weights each time."""
    ours, mine = of_ours(make(), rank, watch)
    theirs, other = eva_of_peft(make(), rank, watch)
    sines = sorted(sine(mine[layer], other[layer]) for layer in other)
    row = (
        "eva",
        f"{ours.seconds:.2f}",
        f"{theirs.seconds:.2f}",
        f"{theirs.seconds / ours.seconds:.1f}",
        f"{ours.megabytes:.0f}",
        f"{theirs.megabytes:.0f}",
        f"{sines[len(sines) // 2]:.1e}",
        f"{sines[-1]:.1e}",
    )
    header = (
        f"{name}, {ROWS} x {LENGTH} tokens",
        "ours s",
        "PEFT s",
        "ratio",
        "ours MB",
        "PEFT MB",
        "median",
        "largest",
    )
    return table(header, [row])


def of_ours(model: Any, rank: int, watch: Callable[[], Measure]) -> tuple[Measure, Spaces]:
    model.requires_grad_(False)
    targets = find_targets(model, "all-linear", rank)
    settings = Adapter(method="eva", rank=rank, init_tokens=ROWS * LENGTH, rho=RATIO)
    store: Any = MemoryStore(
        [Pack(ids, np.arange(LENGTH) >= PROMPT, (LENGTH,)) for ids in tokens(model)]
    )
    loss = SupervisedLoss(model)
    with watch() as used:
        factors, _, _ = eva_factors(loss, targets, settings, store, torch.device("cpu"))
    return used, {name: item.a0 for name, item in factors.items()}


def eva_of_peft(model: Any, rank: int, watch: Callable[[], Measure]) -> tuple[Measure, Spaces]:
    from peft import EvaConfig, LoraConfig, get_eva_state_dict

    names = list(find_targets(model, "all-linear", rank))
    config = LoraConfig(
        r=rank, init_lora_weights="eva", target_modules=names, eva_config=EvaConfig(rho=RATIO)
    )
    with warnings.catch_warnings(), watch() as used:
        warnings.simplefilter("ignore")
        found = get_eva_state_dict(model, [batch(model)], config, show_progress_bar=False)
    return used, {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): part
        for name, part in found.items()
    }


def tokens(model: Any) -> np.ndarray:
    """Return token ids (ROWS x LENGTH, int32) with frequencies like those of words in a text."""
    size = model.config.get_text_config().vocab_size
    return (np.random.default_rng(0).zipf(1.3, (ROWS, LENGTH)) % (size - 2) + 2).astype(np.int32)


def batch(model: Any) -> dict[str, Tensor]:
    ids = torch.from_numpy(tokens(model).astype(np.int64))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def sine(one: Tensor, other: Tensor) -> float:
    """Return the sine of the largest angle between two row spaces; the longer one is cut to the shorter."""
    size = min(len(one), len(other))
    bases = [torch.linalg.qr(part[:size].double().T).Q for part in (one, other)]
    left = bases[0] - bases[1] @ (bases[1].T @ bases[0])
    return float(torch.linalg.matrix_norm(left, 2)) if size else 0.0
