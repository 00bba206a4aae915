"""Waiting for a condition, in place of a sleep that is hoped to be long enough."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], seconds: float = 120, pause: float = 0.02) -> None:
    """Poll until the condition holds; an AssertionError if it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(pause)
