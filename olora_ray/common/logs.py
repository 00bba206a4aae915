"""Log lines for people: the time of day, the message, and *** in place of secrets.

Modules write to `logging.getLogger(__name__)`. Where the lines go is decided once per process: an entry script
prints them (`printed`), a training worker sends them to its driver, a trial of a search keeps them in a file
(`handled_by`).
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from olora_ray.common.secrets import mask

PACKAGE = "olora_ray"
_guard, _handlers = threading.Lock(), list[logging.Handler]()
"""Those in use: several trainings may share a process."""
_before: dict[str, Any] = {}
"""The logger's settings before the first of them."""


def line(record: logging.LogRecord) -> str:
    """The message of a record without secrets; `warning: ` or `error: ` goes before what is more than information."""
    prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
    return mask(prefix + record.getMessage())


class LineFormatter(logging.Formatter):
    """`HH:MM:SS message`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        return f"{self.formatTime(record, '%H:%M:%S')} {line(record)}"


class _Printer(logging.StreamHandler):  # type: ignore[type-arg]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, beside whatever else is on the terminal."""
        with _Printer.around():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what went wrong in the main thread: `python ... | head` ends the script instead of filling stderr.

        Other threads lose the line and live on: the main thread meets the same problem at its next line.
        """
        if threading.current_thread() is threading.main_thread():
            raise


@contextlib.contextmanager
def handled_by(handler: logging.Handler) -> Iterator[None]:
    """Let the package's lines, from INFO on, go to this handler and, while it is there, to no handler of others."""
    logger = logging.getLogger(PACKAGE)
    with _guard:
        if not _handlers:
            _before.update(level=logger.level, propagate=logger.propagate)
        _handlers.append(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        with _guard:
            _handlers.remove(handler)
            # A new list: another thread may be going through the old one.
            logger.handlers = [each for each in logger.handlers if each is not handler]
            if not _handlers:
                logger.setLevel(_before["level"])
                logger.propagate = _before["propagate"]
        handler.close()


@contextlib.contextmanager
def printed_within(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Print each line inside a `context()`, which takes a progress bar off the terminal, say, and puts it back."""
    _Printer.around = staticmethod(context)
    try:
        yield
    finally:
        _Printer.around = contextlib.nullcontext


@contextlib.contextmanager
def printed() -> Iterator[None]:
    """Print the package's lines to stdout, a job's log."""
    handler = _Printer(sys.stdout)
    handler.setFormatter(LineFormatter())
    with handled_by(handler):
        yield
