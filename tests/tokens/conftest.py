from collections.abc import Callable
from pathlib import Path

import pytest

from olora_ray.config.schema import Config
from olora_ray.tokens import manifest, plan
from olora_ray.tokens import prepare as writer
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


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch, ray_with: Callable[[int], None]) -> Callable[..., None]:
    """`spread(cpus, scans)` makes Ray's tasks build even small shards, and scan small files if `scans`."""

    def start(cpus: int, scans: bool = False) -> None:
        monkeypatch.setattr(writer, "MAKE_HERE", 0)
        monkeypatch.setattr(writer, "SCAN_HERE", 0 if scans else writer.SCAN_HERE)
        monkeypatch.setattr(manifest, "SECONDS_BETWEEN_LINES", 0.0)
        ray_with(cpus)

    return start
