"""Collation of packs into one micro-batch of tensors.

Two layouts of the same examples: *flat* (1, T) without any padding, for attention that is told the segments' borders;
*padded* (B, L), for attention that takes masks. In both, positions restart with each example. Where a mask is
needed the model builds it from these positions (transformers.masking_utils), so it is the family's own, with windows
and chunks.

A flat batch may have the prompt of a pair once: prompt + chosen answer | rejected answer. The positions of the rejected
answer then begin after the prompt, and attention puts both whole segments together for itself (model/attention.py). The
last bits of a loss can differ from those of two whole segments, so a run keeps one layout, from the reference to the
last step. The layout is a part of the attention's name: `segments, prompt once`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olora_ray.tokens.plan import REJECTED, Pack

FLAT_ATTENTION = ("segments", "varlen", "flash_attention_2")
PROMPT_ONCE = ", prompt once"
"""End of an attention's name in a run that has the prompt of a pair once in its batches."""


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Tensor | int]
    """Arguments of the model's backbone."""
    predicts: Tensor
    """Flat positions (int64) whose hidden state predicts a supervised token, in order."""
    labels: Tensor
    """The supervised tokens (int64), one per entry of `predicts`."""
    segments: tuple[int, ...]
    """Number of supervised tokens of each segment; they sum up to the length of `labels`."""
    tokens: int
    """Without padding."""
    roles: tuple[int, ...] = ()
    """`Pack.roles` of all segments."""
    reference: tuple[float, ...] = ()
    """`Pack.reference` of all segments."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device: all of it is one copy, for which the program does not wait."""
        if device.type == "cpu":
            return self
        named = {name: value for name, value in self.inputs.items() if isinstance(value, Tensor)}
        each = {
            id(part): part for part in (*named.values(), self.predicts, self.labels)
        }  # the borders are in it twice
        moved = dict(zip(each, _moved(list(each.values()), device), strict=True))
        inputs = self.inputs | {name: moved[id(part)] for name, part in named.items()}
        return replace(
            self,
            inputs=inputs,
            predicts=moved[id(self.predicts)],
            labels=moved[id(self.labels)],
        )


def _moved(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy integer tensors to a device, each with its own type, through one buffer; for CUDA, in pinned memory."""
    whole = torch.empty(
        sum(part.numel() for part in parts), dtype=torch.int64, pin_memory=device.type == "cuda"
    )
    torch.cat([part.reshape(-1) for part in parts], out=whole)
    cut = whole.to(device, non_blocking=True).split([part.numel() for part in parts])
    return [piece.view(part.shape).to(part.dtype) for piece, part in zip(cut, parts, strict=True)]


def collate(packs: Sequence[Pack], attention: str) -> Batch:
    """Return the batch of `packs` in the layout that the attention implementation takes."""
    if attention in FLAT_ATTENTION:
        return _flat(packs)
    if attention.endswith(PROMPT_ONCE):
        return _prompt_once(_flat(packs), [*chain.from_iterable(pack.segments for pack in packs)])
    return _padded(packs)


def _flat(packs: Sequence[Pack]) -> Batch:
    ids = np.concatenate([pack.input_ids for pack in packs]).astype(np.int64)
    supervised = np.concatenate([pack.supervised for pack in packs])
    lengths = list(chain.from_iterable(pack.segments for pack in packs))
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    chosen = np.flatnonzero(supervised)
    return Batch(
        inputs={
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(_positions(lengths))[None],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        },
        predicts=torch.from_numpy(chosen - 1),
        labels=torch.from_numpy(ids[chosen]),
        tokens=len(ids),
        **_of_segments(packs),
    )


def _prompt_once(batch: Batch, lengths: list[int]) -> Batch:
    """Leave out of each rejected answer the tokens with which the chosen one begins, too; its last token stays."""
    ids = batch.inputs["input_ids"]
    positions = batch.inputs["position_ids"]
    assert isinstance(ids, Tensor)
    assert isinstance(positions, Tensor)
    place = torch.arange(ids.shape[1])
    same = place.clone()
    """Place of each token, for a token that is left out the place in the chosen answer."""
    starts = [0, *accumulate(lengths)]
    for number, role in enumerate(batch.roles):
        if role == REJECTED:
            most = min(lengths[number - 1], lengths[number] - 1)
            chosen = slice(starts[number - 1], starts[number - 1] + most)
            rejected = slice(starts[number], starts[number] + most)
            alike = (ids[0, chosen] == ids[0, rejected]).cumprod(0).bool()
            same[rejected] = torch.where(alike, place[chosen], place[rejected])
    own = (same == place).nonzero()[:, 0]
    if len(own) == len(place):
        return batch
    rows = ((same == place).cumsum(0) - 1)[same]
    # The borders stay those of the whole segments: attention puts these together again.
    changed = {
        "input_ids": ids[:, own],
        "position_ids": positions[:, own],
        "whole_rows": rows,
        "own_places": own,
    }
    inputs = batch.inputs | changed
    return replace(batch, inputs=inputs, predicts=rows[batch.predicts], tokens=len(own))


def _padded(packs: Sequence[Pack]) -> Batch:
    longest = max(len(pack.input_ids) for pack in packs)
    ids = np.zeros((len(packs), longest), dtype=np.int64)
    supervised = np.zeros((len(packs), longest), dtype=bool)
    positions = np.zeros((len(packs), longest), dtype=np.int64)
    for row, pack in enumerate(packs):
        size = len(pack.input_ids)
        ids[row, :size] = pack.input_ids
        supervised[row, :size] = pack.supervised
        # Padding continues the positions of the last example: it follows every token, so no token attends to it.
        last = longest - size + pack.segments[-1]
        positions[row] = _positions([*pack.segments[:-1], last])
    inputs: dict[str, Tensor | int] = {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
    }
    chosen = np.flatnonzero(supervised.reshape(-1))
    return Batch(
        inputs=inputs,
        predicts=torch.from_numpy(chosen - 1),
        labels=torch.from_numpy(ids.reshape(-1)[chosen]),
        tokens=sum(len(pack.input_ids) for pack in packs),
        **_of_segments(packs),
    )


def _of_segments(packs: Sequence[Pack]) -> dict[str, Any]:
    counts = (pack.supervised_counts() for pack in packs)
    return {
        "segments": tuple(chain.from_iterable(counts)),
        "roles": tuple(chain.from_iterable(pack.roles for pack in packs)),
        "reference": tuple(chain.from_iterable(pack.reference for pack in packs)),
    }


def _positions(lengths: Sequence[int]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
