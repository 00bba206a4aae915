"""The table of families as Markdown: for the terminal and for docs/generated/models.md."""

import math
from collections.abc import Iterable, Sequence

from tests.families.row import Row
from tests.families.variants import NAMED

COLUMNS = (
    "model",
    "adapted",
    "experts",
    "attention",
    "start",
    "packed",
    "by positions",
    "loss",
    "gradients",
    "export",
    "parity",
    "verdict",
)


def table(rows: Iterable[Row]) -> str:
    """A row for each variant."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def summary(rows: Sequence[Row]) -> str:
    """The number of these rows that are right, refused, or neither."""
    right, refused = sum(row.right for row in rows), sum(row.refused for row in rows)
    return f"{right} of {len(rows)} right to the end, {refused} refused before the first step" + (
        f", {bad} neither" if (bad := len(rows) - right - refused) else ""
    )


def of_review(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.name in NAMED]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        "–" if row.covered is None else f"{row.covered:.0%}",
        row.experts or "–",
        row.attention or "–",
        "–" if row.start is None else "exact" if row.start else "differs",
        f"{'apart: ' if row.packs is False and row.packed is not None else ''}{shown(row.packed)}",
        shown(row.leaks),
        shown(row.loss),
        shown(row.gradients),
        shown(row.export),
        "–" if row.parity is None else "ok" if row.parity == "ok" else "refused",
        row.verdict.replace("|", "\\|"),
    )


def shown(difference: float | None) -> str:
    """The power of ten below which a difference is: its digits differ on another processor."""
    if difference is None:
        return "–"
    if difference == 0:
        return "0"
    if not math.isfinite(difference):
        return str(difference)
    return f"< 1e{math.floor(math.log10(difference)) + 1}"
