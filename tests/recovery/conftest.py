"""The tiny project that is trained, and the table of all cases at the end."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines import project
from tests.recovery import table

ROWS = pytest.StashKey[list[table.Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session", autouse=True)
def tidy_end() -> Iterator[None]:
    """SIGTERM ends the tests as Ctrl+C does: what they have started is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> list[table.Row]:
    """The table's rows so far."""
    return request.config.stash[ROWS]


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, train.jsonl (60 rows) and eval.jsonl (7 rows)."""
    return project.make_tiny(tmp_path_factory.mktemp("project"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if rows := config.stash[ROWS]:
        shown = table.text(rows)
        terminalreporter.section("interrupted runs")
        terminalreporter.write_line(shown)
        if file := os.environ.get("OLORA_MATRIX_TABLE"):
            Path(file).write_text(shown + "\n")
