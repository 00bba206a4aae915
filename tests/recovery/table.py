"""The outcome of every interrupted run as a table."""

from dataclasses import dataclass


@dataclass
class Row:
    """One case; what is not known when it fails stays empty."""

    case: str
    recovered: bool = False
    again: int | None = None
    lost: float | None = None
    pause: float | None = None
    """Seconds from the event to the next step."""
    same_bytes: bool | None = None

    def cells(self) -> list[str]:
        again = "" if self.again is None else str(self.again)
        lost, pause = (
            "" if seconds is None else f"{seconds:.0f}" for seconds in (self.lost, self.pause)
        )
        return [self.case, _word(self.recovered), again, lost, pause, _word(self.same_bytes)]


HEADER = [
    "case",
    "recovered",
    "steps done again",
    "seconds lost",
    "to the next step",
    "bytes equal",
]


def text(rows: list[Row]) -> str:
    """The rows in columns."""
    cells = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _word(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]
