from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines import project
from tests.recovery.processes import scratch


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project.make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path marks the processes started in it."""
    with scratch() as place:
        yield place
