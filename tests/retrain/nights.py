"""Simulated nights of a gate: held-out rows, results of two models, and how often the challenger is promoted."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from olora_ray.config.nights import Gate
from olora_ray.evaluation.rows import RowResults
from olora_ray.retrain.gate import LOOKS, SHRUNK, HeldOut, decide

BETTER = 0.25
"""A real improvement, in standard deviations of a row's difference."""


@dataclass(frozen=True)
class Kind:
    """A type of held-out rows."""

    name: str
    clusters: int
    rows: int
    """Rows per cluster."""
    alike: float = 0.0
    """Share of the variance of the differences that the rows of a cluster have in common."""
    metric: str = "eval/loss"
    uneven: bool = False
    """Clusters of very different sizes."""
    best_of: int = 1
    """Challenger and champion are each the best of this many equal models on the same rows."""
    pairs: bool = False
    """Preference pairs: the deviation moves their margins, and half as much the loss of the chosen answers."""


KINDS = (
    Kind("20 rows", 20, 1),
    Kind("80 rows", 80, 1),
    Kind("400 rows", 400, 1),
    Kind("80 rows, each the best of 5 steps on them", 80, 1, best_of=5),
    Kind("20 clusters of 10 rows", 20, 10, alike=0.5),
    Kind("40 clusters of 1 to 100 rows", 40, 8, alike=0.5, uneven=True),
    Kind("20 clusters of 20 rows, a score of 0 or 1", 20, 20, alike=0.5, metric="eval/match"),
    Kind("40 pairs", 40, 1, metric="auto", pairs=True),
    Kind("400 pairs", 400, 1, metric="auto", pairs=True),
)


def night(kind: Kind, seed: int, effect: float) -> tuple[RowResults, RowResults, list[int]]:
    """Return the results of challenger and champion on the rows of a night, and the cluster of each row."""
    rng = np.random.default_rng([seed, *map(ord, kind.name)])
    sizes = np.full(kind.clusters, kind.rows)
    if kind.uneven:
        sizes = np.clip(rng.lognormal(np.log(kind.rows), 1.0, kind.clusters).astype(int), 1, 100)
    cluster = np.repeat(np.arange(kind.clusters), sizes)
    count = len(cluster)
    hard = rng.normal(3.0, 0.5, count)  # hard for both models
    tokens = rng.integers(5, 200, count)

    def model() -> np.ndarray:
        """Return a model's deviations from the mean of all models; with variance 1/2, differences have variance 1."""
        common, own = rng.normal(size=kind.clusters)[cluster], rng.normal(size=count)
        return np.sqrt(0.5) * (np.sqrt(kind.alike) * common + np.sqrt(1 - kind.alike) * own)

    def best(steps: int) -> np.ndarray:
        return min((model() for _ in range(steps)), key=lambda found: float((found * tokens).sum()))

    ours = best(kind.best_of) - effect
    theirs = best(kind.best_of)

    return (
        _results(kind, hard, ours, tokens),
        _results(kind, hard, theirs, tokens),
        cluster.tolist(),
    )


def _results(kind: Kind, hard: np.ndarray, deviation: np.ndarray, tokens: np.ndarray) -> RowResults:
    if kind.pairs:
        margins = 10.0 * (hard - 2.5 - deviation)
        scores = {"pairs/loss": dict(enumerate(np.logaddexp(0.0, -0.1 * margins).tolist()))}
        losses = 0.1 * deviation + hard
    else:
        losses = 0.2 * deviation + hard
        scores = {"match": dict(enumerate((losses < 3.0).astype(float).tolist()))}
    origins = tuple((0, row) for row in range(len(losses)))
    return RowResults(
        "rows", tuple(tokens.tolist()), tuple((losses * tokens).tolist()), scores, origins
    )


def promoted(kind: Kind, nights: int, effect: float) -> float:
    """Return the share of the nights in which the challenger is promoted."""
    gate, passed = Gate.model_validate({"metric": kind.metric}), 0
    for seed in range(nights):
        challenger, champion, clusters = night(kind, seed, effect)
        passed += decide(gate, challenger, champion, HeldOut(clusters)).passed
    return passed / nights


def worse_years(kind: Kind, years: int) -> float:
    """Return the share of years whose last champion is truly worse than the first.

    A year has ten nights with rows of their own; a challenger is truly better or worse by 0.25 at random.
    """
    gate, worse = Gate.model_validate({"metric": kind.metric}), 0
    for year in range(years):
        qualities = np.random.default_rng(year).normal(0.0, BETTER, 10)
        champion = 0.0
        for number, quality in enumerate(qualities.tolist()):
            found = night(kind, 10 * year + number, quality - champion)
            if decide(gate, *found[:2], HeldOut(found[2], sets=number + 1)).passed:
                champion = quality
        worse += champion < 0
    return worse / years


GUARD = Kind("50 rows of other tasks", 50, 1)
FINER = 4.0
"""The mean of 800 rows is this many times finer than that of these; so harms and margin are multiplied by it."""
MARGIN = Gate().guard_margin / 0.2
"""gate.guard_margin in standard deviations of a row's difference."""
SLACK = 0.05
"""Truly worse by no more than this, in the same unit, does not count."""


@dataclass(frozen=True)
class World:
    """What a night's change does; each part of it is measured with noise of its own."""

    name: str
    gain: Callable[[float, float], float]
    """(part, a number with mean 0 and variance 1) -> the true gain on the task."""
    harm: Callable[[float], float]
    """Part -> the true loss on other tasks."""


def _a_quarter(part: float) -> float:
    return 0.25 * part


WORLDS = (
    World("better by 2, forgets .25", lambda part, _: 2 * part, _a_quarter),
    World("better by 1, forgets .25", lambda part, _: part, _a_quarter),
    World("better by .25, forgets .25", lambda part, _: 0.25 * part, _a_quarter),
    World("gains vary by .5, forgets .25", lambda part, z: 0.5 * z * part, _a_quarter),
    World("equal, forgets .25", lambda part, _: 0.0, _a_quarter),
    World(
        "better by 1, parts worse by .25", lambda part, _: part if part == 1 else -0.25, _a_quarter
    ),
    World("better by 1, parts forget .25, too", lambda part, _: part, lambda _: 0.25),
    World("better by .25, forgets nothing", lambda part, _: 0.25 * part, lambda _: 0.0),
)


@dataclass
class Year:
    better: int = 0
    """Promotions of versions that are truly better than their champion, and no worse elsewhere."""
    parts: int = 0
    """Promotions of parts of a change."""
    worse: bool = False
    """True if the last champion is truly worse than the first on the task, or than the best elsewhere."""


def year(kind: Kind, world: World, number: int, shrink: bool) -> Year:
    """Return a year of ten nights, each with held-out rows of its own, and a guard."""
    gate = Gate.model_validate({"metric": kind.metric, "guard_margin": FINER * Gate().guard_margin})
    found = Year()
    task = elsewhere = best = 0.0
    for night_of_year, z in enumerate(np.random.default_rng(number).normal(size=10).tolist()):
        for look, part in enumerate((1.0, *SHRUNK)):
            seed = 4 * (10 * number + night_of_year) + look
            gain = world.gain(part, z)
            lost = elsewhere + world.harm(part)
            *held_out, clusters = night(kind, seed, gain)
            guard = night(GUARD, seed, FINER * (best - lost))[:2]
            rows = HeldOut(clusters, sets=night_of_year + 1)
            decision = decide(gate, *held_out, rows, guard=guard, looks=LOOKS if look else 1)
            if decision.passed:
                task += gain
                elsewhere = lost
                best = min(best, lost)
                found.better += gain > 0 and lost <= best + MARGIN
                found.parts += look > 0
                break
            if not shrink or (look == 0 and not decision.harms):
                break
    found.worse = task < -SLACK or elsewhere > best + MARGIN + SLACK
    return found
