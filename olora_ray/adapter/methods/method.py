"""What a method of the family is: where its adapters start, and what the rest of the project may ask about it.

A method's factors are kept for scale s = 1: A~ and B~. `Method.at_scale` is the one place where s enters, so that
alpha enters neither what workers exchange nor what a search keeps. Layer, exchange, checkpoint, export and merge know
factors only, and never ask which method they are of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from olora_ray.adapter.layer import Factors

Needs = Literal["weight", "activations", "gradients"]
"""What factors are made of: the layer's weight, its inputs at supervised positions, or the gradient of its weight."""


@dataclass(frozen=True)
class Options:
    """Settings of methods beside rank and seed, by the names of their fields in the config's section `adapter`."""

    sigma: float | Literal["matched"] = 0.02
    """nora: size of A0."""
    rho: float = 2.0
    """eva: a layer's rank is at most rho times the rank."""
    init_tokens: int = 1024
    """eva and lora_ga: tokens that are looked at, at most."""
    gamma: float = 16.0
    """lora_ga: the factors' size is that of 1 / sqrt(gamma)."""


DEFAULTS = Options()

Make = Callable[[Tensor, int, int, Options], Factors]
"""(material, rank, seed, options) -> A~ (r x n) and B~ (m x r, or None for zeros), float32, on the material's device.

The material is what the method needs; a weight is (E x) m x n in float32, the factors of E experts are stacked. The
same arguments give the same factors, whatever the global random numbers are; expert number e has the seed `seed` + e.
"""


def keeps(options: Options) -> tuple[float, float]:
    """Powers of s for factors that do not depend on s."""
    return 0.0, 0.0


@dataclass(frozen=True)
class Method:
    """One method of the family."""

    name: str
    """As in `adapter.method`."""
    source: str
    """Paper and equation."""
    about: str
    """What it is, in up to three lines of 120 columns, for docs/method.md."""
    factors: Make
    cost: Callable[[int, int, int], float]
    """(m, n, rank) -> multiplications for one matrix, about: shares of the workers are balanced by it."""
    needs: Needs = "weight"
    prefix: bool = True
    """Whether the factors of a smaller rank are the first rows and columns of those of a larger one."""
    has_b0: bool = True
    """Whether it gives a B0, for every layer; without, the adapter's rank is r instead of 2r."""
    rank_limit: Callable[[int, int], int] = min
    """(m, n) -> the largest rank that a layer allows."""
    rank_multiple: int = 1
    """Ranks must be multiples of it."""
    even: bool = False
    """True if the first batch of a training rescales the factors (train/first_step.py)."""
    scale_powers: Callable[[Options], tuple[float, float]] = keeps
    """The powers of s by which A~ and B~ are divided."""

    def largest_rank(self, m: int, n: int) -> int:
        """The largest rank that a layer of this shape (out x in) allows; 0 if none."""
        limit = self.rank_limit(m, n)
        return limit - limit % self.rank_multiple

    def problem(self, m: int, n: int, rank: int, layer: str = "a layer") -> str | None:
        """One line that says what to set instead if the method cannot have this rank in a layer of m x n."""
        if rank % self.rank_multiple:
            near = rank - rank % self.rank_multiple
            use = f"{near} or {near + self.rank_multiple}" if near else str(self.rank_multiple)
            return f"adapter.rank={rank}: {self.name} needs a multiple of {self.rank_multiple}; use {use}"
        if rank > self.largest_rank(m, n):
            return (
                f"adapter.rank={rank} is too large for {layer} ({m} x {n}) with adapter.method={self.name}: use at most"
                f" {self.largest_rank(m, n)}, or leave the layer out of adapter.targets"
            )
        return None

    def at_scale(self, found: Factors, scale: float, options: Options) -> Factors:
        """A0 and B0 for the scale s = `scale` from A~ and B~; the same object where s does not enter."""
        for_a, for_b = self.scale_powers(options)
        if for_a == for_b == 0.0:
            return found
        b0 = None if found.b0 is None else found.b0 / scale**for_b
        return Factors(found.a0 / scale**for_a, b0, found.full_rank)
