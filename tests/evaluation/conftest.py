"""A small model folder for the tests of evaluation."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a folder, without a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama().save_pretrained(folder)
    return folder
