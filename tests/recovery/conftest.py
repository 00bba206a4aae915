"""The tiny project that is trained."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines import project


@pytest.fixture(scope="session", autouse=True)
def tidy_end() -> Iterator[None]:
    """SIGTERM ends the tests as Ctrl+C does: what they have started is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, train.jsonl (60 rows) and eval.jsonl (7 rows)."""
    return project.make_tiny(tmp_path_factory.mktemp("project"))
