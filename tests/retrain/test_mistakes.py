"""Mistakes of users are reported before anything expensive starts, and recorded as a failed decision."""

from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from pipelines import retrain
from tests import mlflow_database
from tests.retrain.nightly import Nightly


def refused(nightly: Nightly, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        retrain.main([str(nightly.config), *arguments])
    return str(caught.value)


def test_a_failure_is_recorded_with_its_reason(folder: Path, model: Path) -> None:
    nightly = Nightly(folder, model)
    mlflow_database.place(folder / "runs")
    (folder / "heldout.jsonl").unlink()
    assert "heldout.jsonl: no such file" in refused(nightly)
    assert "data.eval: retraining compares" in refused(nightly, "data.eval=[]")
    first, second = nightly.decisions()
    assert first.data.tags["olora.decision"] == second.data.tags["olora.decision"] == "failed"
    assert "heldout.jsonl: no such file" in first.data.tags["olora.reason"]
    assert first.info.status == "FAILED"
    assert not list((folder / "runs" / "locks").glob("*.json")), "the lock is given back"
