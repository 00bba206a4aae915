"""Ray Serve LLM's own loader takes what `olora-ray follow --mirror` writes; deploy/serve/app.py follows an alias.

Needs ray[serve], which `make serve-test` installs.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from olora_ray.common import storage
from olora_ray.serving.follow import Mirror
from olora_ray.serving.watch import Watch
from tests.pipelines.project import ROOT
from tests.serving.versions import FOLLOWED, NAME, Versions, registered
from tests.waiting import until

pytest.importorskip("grpc_reflection", reason="ray[serve] is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versions]:
    with registered(tmp_path_factory.mktemp("serve"), 2) as found:
        yield found


def test_ray_serve_llm_loads_what_the_mirror_has(
    versions: Versions, bucket: str, tmp_path: Path
) -> None:
    from ray.llm._internal.serve.core.configs.llm_config import LoraConfig
    from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader

    watch, place = (
        Watch(FOLLOWED, versions.server.uri, tmp_path / "cache"),
        storage.join(bucket, "adapters"),
    )
    adapter = watch.look()
    assert adapter
    Mirror(place).write(FOLLOWED, adapter)
    folder = storage.read_text(storage.join(place, FOLLOWED)).strip()
    config = SimpleNamespace(lora_config=LoraConfig(dynamic_lora_loading_path=place))
    loader = LoraModelLoader(lora_root=str(tmp_path / "loaded"))
    loaded = asyncio.run(loader.load_model_from_config(f"base:{folder}", config))
    files = {file.name: file.read_bytes() for file in Path(loaded.local_path).iterdir()}
    assert files == {file.name: file.read_bytes() for file in versions.adapter("1").iterdir()}


@pytest.mark.ray
def test_the_app_follows_the_champion(versions: Versions, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": versions.server.uri,
        "FOLLOW": FOLLOWED,
        "BASE": str(versions.base),
        "HOME": str(tmp_path),
    }

    def answered() -> str:
        body = json.dumps(
            {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        ).encode()
        try:
            with urllib.request.urlopen("http://127.0.0.1:8000", body, timeout=60) as response:
                return str(json.load(response)["model"])
        except OSError:
            return ""

    log = tmp_path / "log"
    with log.open("w") as out:
        program = str(Path(sys.executable).with_name("serve"))
        process = subprocess.Popen(
            [program, "run", "deploy.serve.app:app"],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=out,
        )
    try:
        until(lambda: process.poll() is not None or answered() == f"{NAME}@1", 300, pause=1)
        assert process.poll() is None, log.read_text()[-3000:]
        versions.aliases.promote("2", "by test")
        until(lambda: answered() == f"{NAME}@2", 10)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
