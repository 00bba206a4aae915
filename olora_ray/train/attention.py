"""Attention that stays inside segments: one scaled-dot-product call a segment, nothing masked.

A micro-batch is laid out flat, (1, T): its examples one after the other without padding. Block-diagonal
attention over a mask costs T^2; one causal call a segment costs the sum of the squared lengths, and
torch's fused kernels take it (PyTorch `scaled_dot_product_attention`).
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "segments"


def register() -> None:
    """Make `attn_implementation="segments"` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    query (1, H, T, D), key and value (1, H', T, D); `cu_seq_lens_q` holds the segments' borders
    0 = c0 < c1 < ... = T; the result is (1, T, H, D). Without borders the whole is one segment.
    """
    borders = cu_seq_lens_q.tolist() if cu_seq_lens_q is not None else [0, query.shape[2]]
    grouped = query.shape[1] != key.shape[1]
    lengths = [stop - start for start, stop in pairwise(borders)]
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None
