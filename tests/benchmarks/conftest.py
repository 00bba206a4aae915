"""Modules of benchmarks/, imported as its scripts do: by their names alone."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines import project


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark's module by name."""
    monkeypatch.syspath_prepend(str(Path(project.ROOT) / "benchmarks"))
    return importlib.import_module
