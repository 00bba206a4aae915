"""Small pieces of text for people: plurals, times, tables."""

import difflib
import glob
import os
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
