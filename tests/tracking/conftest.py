"""A model folder, a real MLflow over SQLite, and versions in it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from olora_ray.config.schema import Adapter
from olora_ray.tracking import models, run
from olora_ray.tracking.models import Contents
from olora_ray.tracking.start import start_run
from tests import mlflow_database, tiny
from tests.export_parts import Case, make_case, save_tokenizer

TAGS = {"olora.method": "olora", "olora.rank": 4, "olora.eval_loss": ""}
"""Tags of the version of `triage`."""


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
    """A storage with MLflow's database."""
    return mlflow_database.place(tmp_path_factory.mktemp("versions") / "runs")


@pytest.fixture
def address(tmp_path: Path) -> str:
    """The address of an MLflow with an empty database."""
    return f"sqlite:///{mlflow_database.place(tmp_path)}/mlflow.db"


@pytest.fixture
def tracker(database: Path) -> run.Tracker:
    return start_run(tiny.config(run__storage=str(database)), "test", {})


@pytest.fixture(scope="module")
def triage(database: Path, merged: Path) -> run.Tracker:
    """A run with version 1 of the model `triage`, alias candidate."""
    found = start_run(tiny.config(run__storage=str(database)), "test", {})
    assert (
        models.register(found, Contents(merged, answers_as="org/base"), "triage", "candidate", TAGS)
        == 1
    )
    return found


@pytest.fixture
def add(database: Path, merged: Path) -> Callable[[str], tuple[str, str]]:
    """`add(name)` registers one more version as challenger: (MLflow's address, version)."""

    def register(name: str) -> tuple[str, str]:
        tracker = start_run(tiny.config(run__storage=str(database)), "test", {})
        tags = {"olora.eval_loss": "1.5000", "olora.data_digest": "0123456789abcdef"}
        return tracker.uri, str(
            models.register(tracker, Contents(merged), name, "challenger", tags)
        )

    return register
