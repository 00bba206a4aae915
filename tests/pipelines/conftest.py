from pathlib import Path

import pytest

from tests.pipelines import project


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with tokenizer."""
    return project.make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return project.make_rows(tmp_path)
