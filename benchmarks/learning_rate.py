"""Parts of benchmarks/settings.py: token stores of chats, and new adapters with the move of their first step.

docs/generated/learning_rate.md comes from the script of this name at the tag before-open.
"""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import MemoryStore

from olora_ray.adapter.initialise import at_scale
from olora_ray.adapter.inject import find_targets, inject, remove
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Pack
from olora_ray.train import first_step
from olora_ray.train.data_driven import new_factors
from olora_ray.train.first_step import Move

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
Chat = list[dict[str, str]]


def chat(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def store(tokenizer: Any, rows: Iterable[Chat]) -> Any:
    """One chat per sequence; the last answer and its end are supervised."""
    packs = []
    for row in rows:
        whole = tokenizer.apply_chat_template(row, tokenize=False).rstrip("\n")
        asked = tokenizer.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(asked, add_special_tokens=False).input_ids
        answer = tokenizer(whole[len(asked) :], add_special_tokens=False).input_ids
        ids = np.array(prompt + answer)
        packs.append(Pack(ids, np.arange(len(ids)) >= len(prompt), (len(ids),)))
    return HeldOut(packs)


class HeldOut(MemoryStore):
    @property
    def manifest(self) -> Any:
        return SimpleNamespace(supervised=sum(int(pack.supervised.sum()) for pack in self))


def adapt(
    cell: Any, loss: Any, rows: Any, seed: int
) -> tuple[dict[str, AdaptedWeight], dict[str, Move]]:
    """Put new adapters into the model; return them, and how far the first step moves each layer."""
    remove(loss.model)
    settings = cell.settings(seed=seed)
    targets = find_targets(loss.model, "all-linear", cell.rank)
    factors, *_ = new_factors(loss, targets, settings, rows, CPU)
    adapted = inject(loss.model, at_scale(factors, settings.adapter), settings.adapter.scale())
    batch = collate(first_step.examples(rows[:8]), loss.model.config._attn_implementation)
    return adapted, first_step.output_shift(loss, adapted, batch)
