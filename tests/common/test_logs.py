"""Lines of the log: one form, secrets masked, and a line that cannot be written harms nobody but the main thread."""

import contextlib
import logging
import sys
import threading

import pytest

from olora_ray.common import logs
from tests.said import said
from tests.terminal import Terminal

logger = logging.getLogger("olora_ray.test_logs")


class _Broken:
    """A stream whose reader has gone."""

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_line_has_the_time_and_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.printed():
        logger.info("at postgresql://ann:c4n4ry@db/x")
        logger.warning("%d values wait", 7)
        logger.debug("not this")
    first, second = capsys.readouterr().out.splitlines()
    assert first[2] == first[5] == ":"
    assert first[8:] == " at postgresql://ann:***@db/x"
    assert second[8:] == " warning: 7 values wait"


def test_a_terminal_gets_lines_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with contextlib.redirect_stdout(Terminal()) as screen, logs.printed():
        logger.info(f"memory{' and more' * 10}\n  a  table")
        logger.info(f"serve{' a command' * 10}", extra={"copied": True})
    *lines, table, command = screen.getvalue().splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 40
    assert {line[:9] for line in lines[1:]} == {" " * 9}
    assert table == "  a  table"
    assert command.endswith(f"serve{' a command' * 10}")


def test_after_the_last_handler_the_logger_is_as_before() -> None:
    package = logging.getLogger(logs.PACKAGE)
    before = package.propagate, list(package.handlers)
    with said() as outer:
        with said() as inner:
            logger.info("one")
        logger.info("two")  # the level is still that of the outer one
    assert (outer, inner) == (["one", "two"], ["one"])
    assert (package.propagate, package.handlers) == before


def test_a_closed_pipe_ends_the_main_thread_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Broken())
    survived = threading.Event()

    def work() -> None:
        logger.warning("nobody reads this")
        survived.set()

    with logs.printed():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with pytest.raises(BrokenPipeError):
            logger.info("nor this")
    assert survived.is_set()
