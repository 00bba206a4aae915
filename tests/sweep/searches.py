"""Made-up searches that look like real ones."""

import math
import random

from olora_ray.sweep.record import SearchRecord, Status, TrialRecord

RANKS = (8, 16, 32, 64)


def realistic(trials: int = 12) -> SearchRecord:
    """Return a search over rank, alpha = 2 x rank and rate with ASHA: some trials finish, most stop, one fails."""
    rng = random.Random(7)
    made = [_trial(number, rng) for number in range(trials)]
    return SearchRecord(
        name="rank-alpha-lr",
        metric="eval/loss",
        mode="min",
        searcher="tpe",
        scheduler="asha",
        seconds=612.0,
        trials=tuple(made),
        fields=("adapter.rank", "adapter.alpha", "train.lr", "adapter.rank_stabilized"),
        default=0,
    )


def _trial(number: int, rng: random.Random) -> TrialRecord:
    rank = RANKS[number % 4]
    alpha, lr = 2 * rank, 10 ** rng.uniform(-4.6, -2.3)
    stabilized = rng.random() < 0.5
    if number == 0:
        rank, alpha, lr, stabilized = 16, 16, 2e-4, False
    floor = 0.86 + 0.09 * (math.log10(lr) + 3.2) ** 2 - 0.012 * math.log2(rank / 8)
    if number == 5:
        lr, floor = 9e-3, 6.3
    status: Status = "finished" if floor < 0.93 or number == 0 else "stopped"
    last = 60 if status == "finished" else rng.choice((10, 20))
    curve = [
        (step, floor + (1.48 - floor) * math.exp(-step / 9) + rng.gauss(0, 0.004))
        for step in range(0, last + 1, 10)
    ]
    params = {
        "adapter.rank": rank,
        "adapter.alpha": alpha,
        "train.lr": lr,
        "adapter.rank_stabilized": stabilized,
    }
    reason = (
        "" if status == "finished" else f"stopped by asha at step {last}: not among the better half"
    )
    if number == 9:
        status, reason, last, curve = (
            "failed",
            "loss is NaN at step 7: lower train.lr",
            7,
            curve[:1],
        )
    return TrialRecord(
        number=number,
        params=params,
        status=status,
        value=min(value for _, value in curve) if status != "failed" else None,
        step=last,
        total=60,
        curve=tuple(curve),
        seconds=20 + 1.4 * last,
        first_step=3.1 + rng.random(),
        spared=38.5 if number else 0.0,
        reason=reason,
        folder=f"runs/rank-alpha-lr/trial-{number:03d}",
        mlflow_run=f"{number:032x}",
    )
