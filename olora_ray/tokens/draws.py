"""Draws of rows: which are held out, and which are used where a weight is not whole."""

import logging

import numpy as np
from numpy.typing import NDArray

from olora_ray.tokens import rng
from olora_ray.tokens.plan import Piece, Plan

logger = logging.getLogger(__name__)

LIKELY = 50
"""Rows to be expected from which on no draw leaves none of them."""


def taken(plan: Plan, piece: Piece, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The rows of a piece that belong to the split and are used in its turn.

    Whether a row is held out depends on the seed, the content of its file and its place there. Where a weight is
    not whole, each row is drawn by itself, by a hash of its place: never by a rule that a file's layout could meet.
    """
    planned = plan.files[piece.file]
    keep = np.ones(len(places), dtype=bool)
    if plan.eval_fraction is not None:
        held_out = rng.bernoulli_mask(plan.eval_fraction, rng.key("eval", plan.seed, planned.sha256), places)
        keep = held_out if plan.split == "eval" else ~held_out
    if piece.share < 1.0:
        keep = keep & rng.bernoulli_mask(piece.share, _draw_key(plan, piece), places)
    return keep


def _draw_key(plan: Plan, piece: Piece) -> int:
    sha256 = plan.files[piece.file].sha256
    if plan.split == "eval":
        # The same held-out rows with every seed, and whatever else is there: results are compared over time.
        return rng.key("share", sha256, piece.turn)
    return rng.key("share", plan.seed, plan.draw, piece.file, sha256, piece.turn)


def warn_of_empty(plan: Plan, setting: str) -> None:
    """Say so where the weight of a small source leaves nothing of it, which could be missed among other sources."""
    for number, source in enumerate(plan.sources):
        if source.weight >= 1.0:
            continue
        pieces = [piece for shard in plan.shards for piece in shard if plan.files[piece.file].source == number]
        rows = sum(piece.unit.rows for piece in pieces)
        if rows * source.weight * plan.kept_share < LIKELY and not any(_count(plan, piece) for piece in pieces):
            logger.warning(
                f"{setting}.{number}.weight: {source.weight:g} leaves no row of the {rows:,} of {source.path}"
                f" in {plan.split}"
            )


def _count(plan: Plan, piece: Piece) -> int:
    """The places of a piece that are taken; what is there is known once they are read."""
    first = piece.unit.first
    return int(taken(plan, piece, np.arange(first, first + piece.unit.rows, dtype=np.int64)).sum())
