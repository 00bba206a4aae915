"""Small pieces of text for people: plurals, times, tables."""

import difflib
import glob
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence


def plural(number: int, noun: str) -> str:
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {noun}s"


def did_you_mean(path: str) -> str:
    """Return `; did you mean PATH?` if the folder of a missing file has a similar name, else nothing."""
    folder, name = os.path.split(path)
    near = difflib.get_close_matches(name, glob.glob("*", root_dir=folder or None), n=1, cutoff=0.8)
    if not near:
        return ""
    return f"; did you mean {os.path.join(folder, near[0])}?"


def shortened(text: str, most: int) -> str:
    """Return at most so many characters of a text; dots stand for the rest."""
    if len(text) <= most:
        return text
    return f"{text[: most - 3]}..."


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:most])
    if len(names) > most:
        shown += f" and {len(names) - most} more"
    return shown


def minute(seconds: float) -> str:
    """Return seconds since 1970 as the date and minute on this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def duration(seconds: float) -> str:
    """Return a duration as `4.2 s`, `3 min 12 s` or `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool] = ()) -> list[str]:
    """Return each row as a line, with two spaces between the columns. `right`: which columns are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    flush = right or [False] * len(widths)
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, flush, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


# A terminal: its window limits the width of a line. A file or pipe gets all, because scripts read it.

CELL = 20
"""Most characters of a cell on a terminal: a longer one loses its middle."""


def window() -> int | None:
    """Return the columns of the terminal that shows stdout; None if stdout is no terminal."""
    if not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return the lines of `aligned`; on a terminal shortened, with as many of the first columns as fit.

    The first row has the names of the columns. A last line names those that are left out.
    """
    width = window()
    if width is None:
        return "\n".join(aligned(rows))
    shown = [[_without_middle(cell) for cell in row] for row in rows]
    lines = aligned(shown)
    while max(map(len, lines)) > width and len(shown[0]) > 1:
        shown = [row[:-1] for row in shown]
        lines = aligned(shown)
    rest = rows[0][len(shown[0]) :]
    if rest:
        lines.append(paragraph(f"(not shown: {', '.join(rest)}; `| cat` shows all)"))
    return "\n".join(lines)


def _without_middle(cell: str) -> str:
    if len(cell) <= CELL:
        return cell
    half = CELL // 2 - 1
    return f"{cell[:half]}..{cell[-half:]}"


def paragraph(line: str, indent: int = 2) -> str:
    """Return a line; on a terminal it is wrapped, and its other lines begin after `indent` blanks."""
    # A path that is longer than the window stays whole, so that it can be copied.
    return textwrap.fill(
        line,
        window() or sys.maxsize,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
