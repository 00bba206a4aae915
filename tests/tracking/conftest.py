"""A model folder, a real MLflow over SQLite, and versions in it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from olora_ray.config.schema import Adapter
from olora_ray.tracking import models
from olora_ray.tracking.contents import Contents
from olora_ray.tracking.start import start_run
from tests import mlflow_database, tiny
from tests.export_parts import Case, make_case, save_tokenizer


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("model") / "base"
    found = make_case(base, tiny.llama(dtype=torch.bfloat16), Adapter(rank=4, alpha=8))
    save_tokenizer(base)
    return found


@pytest.fixture(scope="session")
def merged(case: Case) -> Path:
    return case.write_merged(case.base.parent / "merged")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with MLflow's database beside it."""
    return mlflow_database.place(tmp_path_factory.mktemp("versions") / "runs")


@pytest.fixture
def add(database: Path, merged: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[str, str]]:
    """`add(name)` registers one more version as challenger: (MLflow's address, version)."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def register(name: str) -> tuple[str, str]:
        tracker = start_run(tiny.config(run__storage=str(database)), "test", {})
        tags = {"olora.eval_loss": "1.5000", "olora.data_digest": "0123456789abcdef"}
        return tracker.uri, str(models.register(tracker, Contents(merged), name, "challenger", tags))

    return register
