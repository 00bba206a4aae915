import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from olora_ray.config import Config
from olora_ray.data import plan
from olora_ray.data.tokenize import TokenizerSpec
from tests.data import helpers


@pytest.fixture(scope="session")
def tiny_spec() -> TokenizerSpec:
    return helpers.spec()


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
def ray_with() -> Iterator[Callable[[int], None]]:
    """`ray_with(cpus)` starts a Ray of its own with so many CPUs, in place of the one before."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }.items():
        os.environ.setdefault(name, value)
    import ray

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path must be short

    def start(cpus: int) -> None:
        ray.shutdown()
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            _temp_dir=folder,
        )

    yield start
    time.sleep(1)  # a call from Ray's own threads after the shutdown would end this process
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
