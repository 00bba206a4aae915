"""A stay: somebody was at a place from some time on. All records of mobility become lists of stays."""

from dataclasses import dataclass, field

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MINUTES = 24 * 60
"""Minutes of a day."""


@dataclass(frozen=True, slots=True)
class When:
    """The local time at which a stay begins: all that is known of a stay that is to be predicted."""

    weekday: int
    """0 (Monday) to 6."""
    minute: int
    """Of the day, 0 to 1439."""

    @property
    def weekend(self) -> bool:
        """Whether the day is a Saturday or Sunday."""
        return self.weekday >= 5


@dataclass(frozen=True, slots=True)
class Stay:
    """One stay of somebody."""

    place: int
    at: int
    """Minutes by which the stays of one person are ordered."""
    when: When
    duration: int | None = None
    """Minutes; None: unknown, as for a check-in."""
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)
    """Where the record stands, from 1."""
