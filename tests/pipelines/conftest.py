from pathlib import Path

import pytest

from tests.pipelines import project


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with tokenizer."""
    return project.make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with train.jsonl (60 rows) and eval.jsonl (7 rows)."""
    project.make_corpus(tmp_path / "train.jsonl", 60)
    project.make_corpus(tmp_path / "eval.jsonl", 7, first=100)
    return tmp_path
