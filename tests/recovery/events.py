"""What shall happen to a run on two hosts, and when: drawn from a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

GAP = 20.0, 60.0
"""Seconds from the begin of one event to that of the next, at least and at most."""
KINDS: dict[str, tuple[float, float]] = {
    "SIGKILL of a worker": (0, 0),
    "SIGSTOP of a worker": (5, 40),
    "exception in a worker": (0, 0),
    "host drained and back": (5, 15),
    "host killed and back": (2, 20),
    "link cut": (5, 30),
    "SIGKILL of a controller": (0, 0),
    "SIGTERM of the driver": (0, 0),
    "SIGKILL of the driver": (0, 0),
}
"""What happens -> for how many seconds, at least and at most."""


@dataclass(frozen=True)
class Event:
    """Something that happens."""

    what: str
    """One of KINDS."""
    gap: float
    """Seconds after the begin of the one before."""
    seconds: float
    """For which a process stands still, a link is cut or a host stays away."""
    draw: float
    """In [0, 1): decides which worker or host it meets."""

    def of(self, choices: int) -> int:
        """Which of so many it meets."""
        return int(self.draw * choices)


def events(seed: int) -> Iterator[Event]:
    """Without end. Each kind comes once in random order before any comes again: few minutes see many kinds."""
    draw = random.Random(seed)
    while True:
        for what in draw.sample(list(KINDS), len(KINDS)):
            yield Event(what, draw.uniform(*GAP), draw.uniform(*KINDS[what]), draw.random())
