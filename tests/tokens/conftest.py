from pathlib import Path

import pytest

from olora_ray.config.schema import Config
from olora_ray.tokens import plan
from tests.tokens import helpers


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SHARD_ROWS", (64, 64))


@pytest.fixture
def corpus(tmp_path: Path, small_shards: None) -> Config:
    """Two sources, twelve shards, one bad row."""
    a = helpers.write_jsonl(tmp_path / "a.jsonl", [*helpers.rows(500), {"text": "x"}])
    b = helpers.write_jsonl(tmp_path / "b.jsonl", helpers.rows(120))
    return helpers.config(tmp_path / "runs", a, {"path": str(b), "weight": 2.0})
