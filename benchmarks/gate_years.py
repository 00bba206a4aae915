"""Years of nightly retrainings through the gate: how often a worse version becomes the champion, and a better one.

    python benchmarks/gate_years.py [--years 1000] [--rows 80,400] [--worlds NAME,...] [--gate FIELD=VALUE ...]
        [--all-nights]

Every night has a challenger of the true quality that its world says, and the project's own `retrain.gate.decide` judges
it. The unit is the standard deviation of one row's difference between two models (0.2 nats per token here). Fixed: the
same held-out rows all year. Rolling: other rows each night, on which both versions are measured. Guard: 800 rows of
another task. A cell has the promotions per year, and the share of the years whose last champion is truly worse than
the first by more than 0.05, on the task or on the guard. "Found": share of the years in which a version that is better
by 0.25, from night 200 on, is champion within 5 and 30 nights.

One shortcut: `decide` is not called on a night that it would refuse in any case, because the improvement, or the guard,
lies clearly below its bound by Student's t, with errors that are 8% smaller. --all-nights calls it always, and ends
with an error if such a night passes.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from olora_ray.config.nights import Gate
from olora_ray.evaluation.rows import RowResults
from olora_ray.evaluation.statistics import quantile
from olora_ray.retrain.gate import LEVEL, SETS, HeldOut, decide

Array = NDArray[Any]
NIGHTS, NEW = 365, 200
UNIT = 0.2
GUARD_ROWS = 800
"""Rows of the text that the package ships."""
MANY = 0.05
WORLDS: dict[str, Callable[[int, int, np.random.Generator], Array]] = {
    "equal": lambda night, years, rng: np.zeros(years),
    "worse .05": lambda night, years, rng: np.full(years, -0.05),
    "worse .1": lambda night, years, rng: np.full(years, -0.1),
    "worse .25": lambda night, years, rng: np.full(years, -0.25),
    "seeds N(0, .1)": lambda night, years, rng: rng.normal(0, 0.1, years),
    "decay to -.3": lambda night, years, rng: np.full(years, -0.3 * night / NIGHTS),
    "grows to .5": lambda night, years, rng: np.full(years, 0.5 * night / NIGHTS),
    "better .25": lambda night, years, rng: np.full(years, 0.25 if night >= NEW else 0.0),
    "forgets .25": lambda night, years, rng: np.full(years, 0.25),
}
"""True quality of a night's challenger, compared with the first champion."""
FORGETS = {"forgets .25": -0.25}
"""True quality of the challengers on the guard; 0 in other worlds."""


def noise(rng: np.random.Generator, *shape: int) -> Array:
    """Return deviations of models from each other; the difference of two has variance 1."""
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.5**0.5)


def weighted(values: Array, weights: Array) -> tuple[Array, Array]:
    """Return the weighted mean over rows and its standard error."""
    total, count = weights.sum(-1), values.shape[-1]
    mean = (weights * values).sum(-1) / total
    off = weights * (values - mean[..., None])
    return mean, np.sqrt(np.square(off).sum(-1) * (count / (count - 1))) / total


def results(losses: Array, weights: Array) -> RowResults:
    sums = (3.0 + UNIT * losses.astype(np.float64)) * weights
    origins = tuple((0, row) for row in range(len(weights)))
    return RowResults(
        "rows", tuple(weights.astype(int).tolist()), tuple(sums.tolist()), {}, origins
    )


class Year:
    """Years of one world, side by side."""

    def __init__(
        self, world: str, rows: int, rolling: bool, gate: Gate, years: int, every: bool
    ) -> None:
        self.world, self.rows, self.rolling, self.gate, self.years, self.every = (
            world,
            rows,
            rolling,
            gate,
            years,
            every,
        )
        self.rng = np.random.default_rng([years, rows, rolling, *map(ord, world)])
        self.weights = self._tokens()
        self.champion = noise(self.rng, years, rows)
        self.quality, self.guard_quality = np.zeros(years), np.zeros(years)
        self.anchor, self.anchor_quality = self.champion.copy(), np.zeros(years)
        self.guard_weights = self.rng.integers(20, 60, GUARD_ROWS).astype(np.float32)
        self.best_guard = noise(self.rng, years, GUARD_ROWS) if gate.guard else None
        self.promotions, self.found = 0, np.full(years, -1)

    def run(self) -> str:
        """Return promotions per year, the share of years that end worse, and how often a better version was found."""
        for night in range(NIGHTS):
            self._night(night)
        worse = np.mean(np.minimum(self.quality, self.guard_quality) < -MANY - 1e-9)
        found = [f"{np.mean((self.found >= 0) & (self.found < nights)):.1%}" for nights in (5, 30)]
        better = f", found {found[0]} / {found[1]}" if self.world.startswith("better") else ""
        return f"{self.promotions / self.years:.2f}, {worse:.1%}{better}"

    def _night(self, night: int) -> None:
        if self.rolling:
            self.weights = self._tokens()
            self.champion = noise(self.rng, self.years, self.rows) - self.quality[:, None].astype(
                np.float32
            )
            if self.gate.anchor is not None:
                self.anchor = noise(self.rng, self.years, self.rows) - self.anchor_quality[
                    :, None
                ].astype(np.float32)
        new = WORLDS[self.world](night, self.years, self.rng)
        challenger = noise(self.rng, self.years, self.rows) - new[:, None].astype(np.float32)
        likely = self._may_pass(challenger, night)
        for year in range(self.years) if self.every else np.flatnonzero(likely):
            if self._passes(year, challenger[year], night):
                assert likely[year], "the shortcut would have refused a version that passes"
                self._promote(year, challenger[year], float(new[year]), night)

    def _tokens(self) -> Array:
        return self.rng.integers(5, 200, (self.years, self.rows)).astype(np.float32)

    def _sets(self, night: int) -> int:
        return night + 1 if self.rolling else 1

    def _may_pass(self, challenger: Array, night: int) -> Array:
        mean, error = weighted(self.champion - challenger, self.weights)
        errors = 0.92 * quantile(self.rows - 1, 1 - 0.05 / max(SETS, self._sets(night)))
        return np.asarray(
            mean - errors * error * self.gate.confident > self.gate.must_improve_by / UNIT
        )

    def _passes(self, year: int, challenger: Array, night: int) -> bool:
        weights, guard = self.weights[year], None
        if self.best_guard is not None:
            self.own_guard = noise(self.rng, GUARD_ROWS) - np.float32(FORGETS.get(self.world, 0.0))
            mean, error = weighted(self.best_guard[year] - self.own_guard, self.guard_weights)
            errors = 0.92 * quantile(GUARD_ROWS - 1, LEVEL)
            if not self.every and mean - errors * error < -self.gate.guard_margin / UNIT:
                return False
            guard = (
                results(self.own_guard, self.guard_weights),
                results(self.best_guard[year], self.guard_weights),
            )
        ours, theirs, best = (
            results(each, weights) for each in (challenger, self.champion[year], self.anchor[year])
        )
        return decide(self.gate, ours, theirs, HeldOut(sets=self._sets(night)), best, guard).passed

    def _promote(self, year: int, challenger: Array, new: float, night: int) -> None:
        weights = self.weights[year]
        if weights @ challenger < weights @ self.anchor[year]:
            self.anchor[year], self.anchor_quality[year] = challenger, new
        if (
            self.best_guard is not None
            and self.guard_weights @ (self.own_guard - self.best_guard[year]) < 0
        ):
            self.best_guard[year] = self.own_guard
        self.champion[year], self.quality[year] = challenger, new
        self.guard_quality[year] = FORGETS.get(self.world, 0.0)
        self.promotions += 1
        if self.found[year] < 0 and night >= NEW:
            self.found[year] = night - NEW


def lines(args: argparse.Namespace) -> Iterator[str]:
    changes = {
        field: yaml.safe_load(value)
        for field, _, value in (each.partition("=") for each in args.gate)
    }
    kinds = [(int(rows), rolling) for rows in args.rows.split(",") for rolling in (False, True)]
    yield (
        "| challengers | guard | "
        + " | ".join(f"{n} {'rolling' if new else 'fixed'}" for n, new in kinds)
        + " |"
    )
    yield "|---" * (2 + len(kinds)) + "|"
    for world in args.worlds.split(",") if args.worlds else WORLDS:
        for guard in ("text", None):
            gate = Gate.model_validate({"guard": guard, **changes})
            cells = [
                Year(world, rows, new, gate, args.years, args.all_nights).run()
                for rows, new in kinds
            ]
            yield f"| {world} | {'yes' if guard else 'no'} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--years", type=int, default=1000)
    parser.add_argument("--rows", default="80,400")
    parser.add_argument("--worlds", default="")
    parser.add_argument("--gate", nargs="*", default=[])
    parser.add_argument("--all-nights", action="store_true")
    began = time.monotonic()
    args = parser.parse_args()
    for line in lines(args):
        print(line, flush=True)
    print(f"{args.years:,} years of {NIGHTS} nights; {time.monotonic() - began:,.0f} s")


if __name__ == "__main__":
    main()
