"""The results of families as Markdown: for the terminal and for docs/generated/models.md."""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from textwrap import shorten
from typing import TypeVar

from tests.families.row import Row

K = TypeVar("K", bound=Hashable)
COLUMNS = (
    "models",
    "experts",
    "attention",
    "packed",
    "by positions",
    "loss",
    "gradients",
    "export",
)
# Where a model's layers take a smaller share of its parameters, the table names it.
MOST = 0.895
# Differences of rounding are smaller; examples that see each other differ by more.
SEEN = 1e-4
NOT_RIGHT = ("not right", "verdict")


def table(rows: Iterable[Row]) -> str:
    """A line per group of models with the same choices, with its largest differences; a line per other verdict."""
    rows = list(rows)
    right, others = [row for row in rows if row.right], [row for row in rows if not row.right]
    groups = ((_names(group), why) for why, group in _groups(others, _reason).items())
    tables = [_markdown(COLUMNS, map(_line, _groups(right, _choices).values()))] if right else []
    return "\n\n".join([*tables, *([_markdown(NOT_RIGHT, groups)] if others else [])])


def told(text: str) -> dict[str, str]:
    """Model -> "right" or its verdict, from the tables of a text."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(
            ("| ---", f"| {COLUMNS[0]} ", f"| {NOT_RIGHT[0]} ")
        ):
            names, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|")))
            verdict = cells[0].replace("\\|", "|") if len(cells) == 1 else "right"
            found |= {re.sub(r" \(.*\)", "", name): verdict for name in names.split(", ")}
    return found


def summary(rows: Sequence[Row]) -> str:
    """The number of these rows that are right, refused, or neither."""
    right, refused = sum(row.right for row in rows), sum(row.refused for row in rows)
    return f"{right} of {len(rows)} right to the end, {refused} refused before the first step" + (
        f", {bad} neither" if (bad := len(rows) - right - refused) else ""
    )


def _groups(rows: Iterable[Row], key: Callable[[Row], K]) -> dict[K, list[Row]]:
    groups: dict[K, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _choices(row: Row) -> tuple[object, ...]:
    return (
        row.experts,
        row.attention,
        row.packs is False,
        (row.leaks or 0) > SEEN,
        row.parity == "ok",
    )


def _line(group: Sequence[Row]) -> tuple[str, ...]:
    first = group[0]
    apart = "apart: " if first.packs is False else ""
    parity = "" if first.parity == "ok" else ", but parity refused"
    packed, *others, export = (
        _largest(group, name) for name in ("packed", "leaks", "loss", "gradients", "export")
    )
    return (
        _names(group),
        first.experts or "–",
        first.attention or "–",
        apart + packed,
        *others,
        export + parity,
    )


def _largest(group: Sequence[Row], name: str) -> str:
    values = [value for row in group if (value := getattr(row, name)) is not None]
    return shown(max(values, default=None))


def _names(group: Iterable[Row]) -> str:
    return ", ".join(
        row.name
        if row.covered is None or row.covered >= MOST
        else f"{row.name} ({row.covered:.0%})"
        for row in group
    )


def _reason(row: Row) -> str:
    # Without what differs from family to family: the class, the model type, and the place in its code.
    line = re.sub(r"model\.name: \w+ (is no|cannot be)", r"model.name: CLASS \1", row.verdict)
    line = re.sub(r" \(\w+\.py, line \d+\)", "", line).replace(f"({row.name})", "(TYPE)")
    return shorten(line, 330, placeholder=" ...").replace("|", "\\|")


def _markdown(head: tuple[str, ...], body: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *body))


def shown(difference: float | None) -> str:
    """The power of ten below which a difference is: its digits differ on another processor."""
    if difference is None:
        return "–"
    if difference == 0:
        return "0"
    if not math.isfinite(difference):
        return str(difference)
    return f"<1e{math.floor(math.log10(difference)) + 1}"
