"""A method of initialising adapters: its factors, and all that other code may ask about it.

A method's factors are kept for scale s = 1: A~ and B~. Only `Method.at_scale` applies s, so that what workers exchange
and what a search keeps does not depend on alpha. Layer, exchange, checkpoint, export and merge use factors alone, and
never ask for their method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from olora_ray.adapter.layer import Factors

Needs = Literal["weight", "activations"]
"""The input of a method: the layer's weight, or its inputs at supervised positions."""


@dataclass(frozen=True)
class Options:
    """Settings of methods other than rank and seed, named like their fields in the config's section `adapter`."""

    sigma: float | Literal["matched"] = 0.02
    """nora: the size of A0."""
    rho: float = 2.0
    """eva: a layer's rank is at most rho times the rank."""
    init_tokens: int = 1024
    """eva: at most this many tokens are read."""


DEFAULTS = Options()

Make = Callable[[Tensor, int, int, Options], Factors]
"""(input, rank, seed, options) -> A~ (r x n) and B~ (m x r, or None for zeros), float32, on the input's device.

The input is what `Method.needs` says; a weight is (E x) m x n in float32, and the factors of E experts are stacked. The
same arguments give the same factors, whatever the global random state is; expert number e has the seed `seed` + e.
"""


def for_each_expert(weight: Tensor, seed: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Return what `draw` makes of the seed, on the device of the weight; of a stack, what it makes for each expert."""
    if weight.dim() == 2:
        return draw(seed).to(weight.device)
    drawn = [draw(seed + expert) for expert in range(len(weight))]
    return torch.stack(drawn).to(weight.device)


@dataclass(frozen=True)
class Method:
    name: str
    """The value of `adapter.method`."""
    source: str
    """Paper and equation."""
    about: str
    """A description in up to three lines of 120 columns, for docs/method.md."""
    factors: Make
    cost: Callable[[int, int, int], float]
    """(m, n, rank) -> approximate number of multiplications for one matrix, which balances the workers' shares."""
    needs: Needs = "weight"
    prefix: bool = True
    """True if the factors of a smaller rank are the first rows and columns of those of a larger rank."""
    has_b0: bool = True
    """True if it gives every layer a B0; without B0 the exported rank is r instead of 2r."""
    rank_multiple: int = 1
    """Ranks must be multiples of this number."""
    scale_powers: Callable[[Options], tuple[float, float]] = lambda options: (0.0, 0.0)
    """The powers of s that divide A~ and B~."""

    def largest_rank(self, m: int, n: int) -> int:
        """Return the largest rank for a layer of this shape (out x in); 0 if there is none."""
        return min(m, n) // self.rank_multiple * self.rank_multiple

    def problem(self, m: int, n: int, rank: int, layer: str = "a layer") -> str | None:
        """Return one line that says what to set instead, if the method cannot have this rank in a layer of m x n."""
        if rank % self.rank_multiple:
            near = rank - rank % self.rank_multiple
            use = f"{near + self.rank_multiple}"
            if near:
                use = f"{near} or {use}"
            return f"adapter.rank={rank}: {self.name} needs a multiple of {self.rank_multiple}; use {use}"
        if rank > self.largest_rank(m, n):
            return (
                f"adapter.rank={rank} is too large for {layer} ({m} x {n}) with adapter.method={self.name}: use at most"
                f" {self.largest_rank(m, n)}, or leave the layer out of adapter.targets"
            )
        return None

    def at_scale(self, factors: Factors, scale: float, options: Options) -> Factors:
        """Return A0 and B0 for the scale s = `scale` from A~ and B~; the same object if s does not matter."""
        for_a, for_b = self.scale_powers(options)
        if for_a == for_b == 0.0:
            return factors
        b0 = None if factors.b0 is None else factors.b0 / scale**for_b
        return Factors(factors.a0 / scale**for_a, b0, factors.full_rank)
