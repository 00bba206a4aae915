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

LEAST = 16
"""Characters to which a cell may be shortened before a column is left out."""


def window() -> int | None:
    """Return the columns of the terminal that shows stdout; None if stdout is no terminal."""
    if not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return the lines of `aligned`; on a terminal, those of `fitted`."""
    width = window()
    lines = aligned(rows) if width is None else fitted(rows, width)
    return "\n".join(lines)


def fitted(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return lines of at most `width` characters: long cells lose their middle, and the last columns may be left out.

    The first row has the names of the columns. A last line names those that are left out.
    """
    count = len(rows[0])
    while count > 1 and _width(rows, count, LEAST) > width:
        count -= 1
    most = width
    while most > LEAST and _width(rows, count, most) > width:
        most -= 1
    lines = aligned([[_without_middle(cell, most) for cell in row[:count]] for row in rows])
    if count < len(rows[0]):
        names = ", ".join(rows[0][count:])
        lines.append(_filled(f"(left out: {names}; a wider window or `| cat` shows all)", width, 2))
    return lines


def _width(rows: Sequence[Sequence[str]], count: int, most: int) -> int:
    columns = list(zip(*rows, strict=True))[:count]
    return sum(min(most, max(map(len, column))) + 2 for column in columns) - 2


def _without_middle(cell: str, most: int) -> str:
    if len(cell) <= most:
        return cell
    end = most // 2 - 1
    return f"{cell[: most - 2 - end]}..{cell[-end:]}"


def paragraph(line: str, indent: int = 2) -> str:
    """Return a line; on a terminal it is wrapped, and its other lines begin after `indent` blanks."""
    width = window()
    if width is None:
        return line
    return _filled(line, width, indent)


def _filled(line: str, width: int, indent: int) -> str:
    # A path or digest that is longer than the window stays whole, so that it can be copied.
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
