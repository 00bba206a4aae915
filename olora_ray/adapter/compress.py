"""An adapter of rank 2r as one of a smaller rank, for servers that take no larger: the best in the Frobenius norm.

The change s U V (U m x 2r, V 2r x n) is never formed: with U = Qu Ru and V^T = Qv Rv its singular values are those of
the 2r x 2r matrix Ru Rv^T, and the best rank-k change keeps the k largest (Eckart and Young, 1936).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from olora_ray.adapter.factors import AdapterWeights, Factors


def compress(adapter: Mapping[str, AdapterWeights], rank: int) -> tuple[dict[str, AdapterWeights], float]:
    """The adapter with at most `rank` directions a layer, and the share of its change that is lost.

    The share is the Frobenius norm of what is lost relative to that of the change, over all layers together. An
    adapter whose matrices have no more than `rank` directions comes back as it is. Stacks keep `rank` an expert.
    """
    if all(weights.plain_rank() <= rank for weights in adapter.values()):
        return dict(adapter), 0.0
    found, lost, whole = {}, 0.0, 0.0
    for name, weights in adapter.items():
        lora_a, lora_b, values = _truncated(weights, rank)
        # B0 = 0, so that the whole change is dB dA: export, merge and checks take it as any other adapter.
        found[name] = AdapterWeights(Factors(torch.zeros_like(lora_a), None), lora_a, lora_b)
        squares = values.square()
        lost, whole = lost + float(squares[..., rank:].sum()), whole + float(squares.sum())
    return found, (lost / whole) ** 0.5 if whole else 0.0


def _truncated(weights: AdapterWeights, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """lora_A (rank x n) and lora_B (m x rank) in float32, and all singular values of their product in float64."""
    lora_a, lora_b = (part.double() for part in weights.plain_lora())
    q_up, r_up = torch.linalg.qr(lora_b)
    q_down, r_down = torch.linalg.qr(lora_a.mT)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    root = values[..., :rank].sqrt()
    up = q_up @ (left[..., :rank] * root.unsqueeze(-2))
    down = (root.unsqueeze(-1) * right[..., :rank, :]) @ q_down.mT
    spare = rank - root.shape[-1]  # a matrix may have fewer directions than the others keep
    up, down = F.pad(up, (0, spare)), F.pad(down, (0, 0, 0, spare))
    return down.float().contiguous(), up.float().contiguous(), values
