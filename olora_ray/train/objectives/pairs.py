"""Preference pairs, ratings and rows with answers in the same packs: DPO (arXiv 2305.18290) against the start.

L_e is the loss of example e, summed over its supervised tokens, and R_e the same before the first step. In delta form
the adapter of a new run is the base model there, to the bit, so the reference needs no second model. For a pair with
the answers c (chosen) and r (rejected), and for a rating:

    m = (R_c - L_c) - (R_r - L_r)                       the pair's margin in nats, 0 before the first step
    f = log(1 + exp(-beta m))                           ln 2 before the first step
    g = 1 / (1 + exp(s beta (R - L)))                   of a rating, s = 1 or -1; as TRL's apo_zero_unpaired

    mean loss = [ sum of f  +  chosen P / N_c x sum of L_c  +  S / N_s x sum of L_s  +  sum of w g ] / (P + S + T)

with P pairs, S other rows s, T ratings, and N_c and N_s supervised tokens of chosen answers and of these rows in the
*global* batch. So each kind has its own mean, which weighs as much as the kind has rows: a lone pair among 30 rows is
1/31. w = T / (2 U) for the U thumbs up and T / (2 D) for the D thumbs down: both sides weigh the same, so that a few of
one kind are heard. With one side alone w = 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from olora_ray.config.schema import PAIR_MEANS, Train
from olora_ray.tokens.collate import Batch
from olora_ray.tokens.plan import CHOSEN, DOWN, REJECTED, UP, Counts
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.objectives.objective import Objective, RowNumbers

NUMBERS = (*PAIR_MEANS, "up", "down", "right", "wrong")
"""Numbers of an example beside its loss. Of a pair: f; 1 if the margin is above 0; margin; and the change of log p of
each answer since the first step. Of an answer with a thumb: this change. Then the losses of right and wrong answers."""


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
    first: list[int] = []
    second: list[int] = []  # of a pair the rejected answer, of other examples the same as `first`
    for number, role in enumerate(roles):
        if role == REJECTED:
            second[-1] = number
        else:
            first.append(number)
            second.append(number)
    of_first = [roles[number] for number in first]
    plain = whole.examples - whole.pairs - whole.ups - whole.downs
    weights = {0: plain / max(whole.plain, 1), CHOSEN: chosen * whole.pairs / max(whole.chosen, 1)}
    both = 2 if whole.ups and whole.downs else 1
    rated = whole.ups + whole.downs
    sides = {UP: rated / (both * max(whole.ups, 1)), DOWN: rated / (both * max(whole.downs, 1))}
    is_pair, is_up, is_down = [
        losses.new_tensor([role == wanted for role in of_first]) for wanted in (CHOSEN, UP, DOWN)
    ]
    own_weights = losses.new_tensor([weights.get(role, 0.0) for role in of_first])
    rating_weights = losses.new_tensor([sides.get(role, 0.0) for role in of_first])

    reference = losses.detach()
    if batch.reference:
        reference = losses.new_tensor(batch.reference)
    # Gains, not losses: their opposite would be -0.0 at the first step, and 0.0 on another number of workers.
    gains = reference - losses
    own = gains[first]
    margins = own - gains[second]
    pushed = is_pair * F.softplus(-beta * margins)
    rated_losses = rating_weights * torch.sigmoid(-beta * (is_up - is_down) * own)
    total = own_weights * losses[first] + pushed + rated_losses
    won = is_pair * (margins.sign() + 1) / 2
    others = [pushed, won, is_pair * margins, is_pair * own, is_pair * gains[second]]
    others += [is_up * own, is_down * own]
    others += [(1 - is_down) * losses[first], is_pair * losses[second] + is_down * losses[first]]
    return torch.stack([total, *(each.detach() for each in others)], dim=1)


def _weight(counts: Counts) -> int:
    return counts.examples


def _means(numbers: Sequence[float], whole: Counts) -> dict[str, float]:
    sums = {name: value * whole.examples for name, value in zip(NUMBERS, numbers[1:], strict=True)}
    means = {"objective": numbers[0], "loss": sums["right"] / max(whole.right, 1)}
    return means | _of_feedback(sums, whole)


def _row(numbers: Sequence[float], size: Counts) -> RowNumbers:
    known = dict(zip(NUMBERS, numbers[1:], strict=True))
    return RowNumbers(known["right"], size.right, _of_feedback(known, size))


def _of_feedback(sums: Mapping[str, float], size: Counts) -> dict[str, float]:
    """Return the means over the pairs and over the ratings of some examples."""
    means = {}
    if size.pairs:
        for name in PAIR_MEANS:
            means[f"pairs/{name}"] = sums[name] / size.pairs
    for name, count in (("up", size.ups), ("down", size.downs)):
        if count:
            means[f"ratings/{name}"] = sums[name] / count
    return means


def _unset(*_: object) -> Tensor:
    raise AssertionError("objective_of gives the objective its settings")


OBJECTIVE = Objective(
    name="pairs",
    loss=_unset,
    each=_unset,
    weight=_weight,
    unit="row",
    takes=frozenset({"pair", "rating", "chat", "completion", "text", "ids"}),
    more=NUMBERS,
    means=_means,
    row=_row,
    with_settings=objective_with,
    # At the rate for rows one step moved the margin of SmolLM2's next pairs by 31 nats, and log p of the chosen answers
    # fell in the end (docs/log.md). A fall of 0.25 is that of beta x margin = 0.5: 5 nats at beta 0.1.
    rate=0.1,
    fall=0.25,
    reference=True,
)
