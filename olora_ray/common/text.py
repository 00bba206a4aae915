"""Small pieces of text for people: plurals, times, tables."""

from collections.abc import Sequence


def plural(number: int, what: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def clock(seconds: float) -> str:
    """A time that runs down, as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """A length of time: 4.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool] = ()) -> list[str]:
    """Each row as a line, in columns two spaces apart; `right` says which are flush right, without it none is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    flush = right or [False] * len(widths)
    return [
        "  ".join(
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, flush, strict=True)
        ).rstrip()
        for row in rows
    ]
