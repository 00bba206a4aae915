"""The cross-entropy of the supervised tokens: each counts alike, whatever example or worker it is in.

loss = sum over supervised tokens t of -log p(token t | tokens before t in its example)
"""

import torch
from torch import Tensor

from olora_ray.tokens.collate import Batch
from olora_ray.tokens.plan import Counts
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.objectives.objective import Objective


def _loss(model: SupervisedLoss, batch: Batch, whole: Counts) -> Tensor:
    total: Tensor = model(batch)
    return total[None]


def _each(model: SupervisedLoss, batch: Batch) -> Tensor:
    losses = model(batch, each=True).double()
    return torch.stack([part.sum() for part in losses.split(batch.examples)])[:, None]


def _weight(counts: Counts) -> int:
    return counts.supervised


OBJECTIVE = Objective(
    name="tokens",
    loss=_loss,
    each=_each,
    weight=_weight,
    unit="supervised token",
    takes=frozenset({"chat", "completion", "text", "ids"}),
    perplexity=True,
)
