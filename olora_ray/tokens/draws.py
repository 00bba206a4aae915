"""Draws of rows: which are held out, and which are used where a weight is not whole."""

import logging

import numpy as np
from numpy.typing import NDArray

from olora_ray.tokens import rng
from olora_ray.tokens.layout import Piece
from olora_ray.tokens.plan import Plan, PlannedFile, Rules

logger = logging.getLogger(__name__)

LIKELY = 50
"""Rows to be expected from which on no draw leaves none of them."""


def taken(rules: Rules, planned: PlannedFile, piece: Piece, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The rows of a piece of a file that belong to the split and are used in its turn.

    Whether a row is held out depends on the seed, the content of its file and its place there. Where a weight is
    not whole, each row is drawn by itself, by a hash of its place: never by a rule that a file's layout could meet.
    """
    keep = np.ones(len(places), dtype=bool)
    if rules.eval_fraction is not None:
        held_out = rng.bernoulli_mask(rules.eval_fraction, rng.key("eval", rules.seed, planned.sha256), places)
        keep = held_out if rules.split == "eval" else ~held_out
    if piece.share < 1.0:
        keep = keep & rng.bernoulli_mask(piece.share, _draw_key(rules, planned.sha256, piece), places)
    return keep


def _draw_key(rules: Rules, sha256: str, piece: Piece) -> int:
    if rules.split == "eval":
        # The same held-out rows with every seed, and whatever else is there: results are compared over time.
        return rng.key("share", sha256, piece.turn)
    return rng.key("share", rules.seed, rules.draw, piece.file, sha256, piece.turn)


def warn_of_empty(plan: Plan, setting: str) -> None:
    """Say so where the weight of a small source leaves nothing of it, which could be missed among other sources."""
    files = np.array([each.source for each in plan.files])
    for number, source in enumerate(plan.sources):
        if source.weight >= 1.0:
            continue
        pieces = plan.shards.pieces
        pieces = pieces[np.flatnonzero(files[pieces.files] == number)]
        rows = int(pieces.units["rows"][pieces.unit].sum(dtype=np.int64))
        if rows * source.weight * plan.kept_share < LIKELY and not any(_count(plan, piece) for piece in pieces):
            logger.warning(
                f"{setting}.{number}.weight: {source.weight:g} leaves no row of the {rows:,} of {source.path}"
                f" in {plan.split}"
            )


def _count(plan: Plan, piece: Piece) -> int:
    """The places of a piece that are taken; what is there is known once they are read."""
    first = piece.unit.first
    places = np.arange(first, first + piece.unit.rows, dtype=np.int64)
    return int(taken(plan, plan.files[piece.file], piece, places).sum())
