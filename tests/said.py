"""The lines that the package logs, caught."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from olora_ray.common import logs


class _Catcher(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(logs.line(record))


@contextlib.contextmanager
def said(tell: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """The lines from here on, as they are printed but for the time; `tell` gets each of them too."""
    lines: list[str] = []

    def catch(line: str) -> None:
        lines.append(line)
        if tell is not None:
            tell(line)

    with logs.handled_by(_Catcher(catch)):
        yield lines
