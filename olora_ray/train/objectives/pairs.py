"""Preference pairs and rows with answers, in the same packs: DPO (arXiv 2305.18290), with the start as the reference.

L_e is the loss of example e, summed over its supervised tokens, and R_e the same before the first step. In delta form
the adapter of a new run is the base model there, to the bit, so the reference needs no second model. For a pair with
the answers c (chosen) and r (rejected):

    m = (R_c - L_c) - (R_r - L_r)            its margin in nats, 0 before the first step
    f = log(1 + exp(-beta m))                ln 2 before the first step

    mean loss = [ sum of f  +  chosen P / N_c x sum of L_c  +  S / N_s x sum of L_s ] / (P + S)

with P pairs, S other rows s, and N_c and N_s supervised tokens of chosen answers and of these rows in the *global*
batch. So each kind has its own mean, which weighs as much as the kind has rows: a lone pair among 30 rows is 1/31.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from olora_ray.config.schema import Train
from olora_ray.tokens.collate import Batch
from olora_ray.tokens.plan import CHOSEN, REJECTED, Counts
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.objectives.objective import Objective

RIGHT = "right"
WRONG = "wrong"
OF_PAIRS = ("loss", "preferred", "margin", "chosen", "rejected")
"""Means over pairs: f; 1 if the margin is above 0; margin; change of log p of each answer since the first step."""


def objective_with(train: Train) -> Objective:
    """Return the objective with `beta` and `chosen` of a training."""

    def each(model: SupervisedLoss, batch: Batch, whole: Counts) -> Tensor:
        losses = model(batch, each=True).double()
        # Sums by parts: those of `cumsum` and `index_add` have no fixed order on GPUs.
        of_segments = torch.stack([part.sum() for part in losses.split(batch.segments)])
        return numbers(of_segments, batch, whole, train.beta, train.chosen)

    def loss(model: SupervisedLoss, batch: Batch, whole: Counts) -> Tensor:
        return each(model, batch, whole).sum(0).float()

    settings = f"beta {train.beta:g}, chosen {train.chosen:g}"
    return replace(OBJECTIVE, loss=loss, each=each, settings=settings)


def numbers(losses: Tensor, batch: Batch, whole: Counts, beta: float, chosen: float) -> Tensor:
    """Losses of segments, float64 (segments,) -> numbers of examples, (examples, 1 + more); the first has a gradient.

    Without a reference the losses are their own: every margin is 0.
    """
    roles = batch.roles or (0,) * len(batch.segments)
    first = [number for number, role in enumerate(roles) if role != REJECTED]
    is_pair = [roles[number] == CHOSEN for number in first]
    second = [number + pair for number, pair in zip(first, is_pair, strict=True)]
    plain_weight = (whole.examples - whole.pairs) / max(whole.plain, 1)
    chosen_weight = chosen * whole.pairs / max(whole.chosen, 1)
    weights = losses.new_tensor([chosen_weight if pair else plain_weight for pair in is_pair])
    pairs = losses.new_tensor(is_pair)

    reference = losses.detach()
    if batch.reference:
        reference = losses.new_tensor(batch.reference)
    # Gains, not losses: their opposite would be -0.0 at the first step, and 0.0 on another number of workers.
    gains = reference - losses
    margins = gains[first] - gains[second]
    pushed = pairs * F.softplus(-beta * margins)
    total = weights * losses[first] + pushed
    won = pairs * ((margins > 0).double() + (margins >= 0).double()) / 2
    others = [pushed, won, pairs * margins, pairs * gains[first], pairs * gains[second]]
    others += [losses[first], pairs * losses[second]]
    return torch.stack([total, *(each.detach() for each in others)], dim=1)


def _weight(counts: Counts) -> int:
    return counts.examples


def _means(numbers: Sequence[float], whole: Counts) -> dict[str, float]:
    objective, *of_pairs, right, _ = numbers
    means = {
        "objective": objective,
        "loss": right * whole.examples / max(whole.plain + whole.chosen, 1),
    }
    if whole.pairs:
        for name, value in zip(OF_PAIRS, of_pairs, strict=True):
            means[f"pairs/{name}"] = value * whole.examples / whole.pairs
    return means


def _unset(*_: object) -> Tensor:
    raise AssertionError("objective_of gives the objective its settings")


OBJECTIVE = Objective(
    name="pairs",
    loss=_unset,
    each=_unset,
    weight=_weight,
    unit="row",
    takes=frozenset({"pair", "chat", "completion", "text", "ids"}),
    more=(*(f"pairs/{name}" for name in OF_PAIRS), RIGHT, WRONG),
    means=_means,
    with_settings=objective_with,
    # At the rate for rows one step moved the margin of SmolLM2's next pairs by 31 nats, at a tenth of it by 5.5.
    rate=0.1,
    reference=True,
    begins=("pairs/loss", math.log(2)),
)
