"""A Ray of our own is not open to others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from olora_ray.common.quiet import quiet_environment
quiet_environment()
import ray, requests
from olora_ray.pipeline.connection import connect
from tests import tiny

with connect(tiny.config()):
    page = ray._private.worker.global_worker.node.address_info["webui_url"]
    print("page", page, requests.get(f"http://{page}/api/jobs/", timeout=10).status_code)
"""


@pytest.mark.ray
def test_a_local_dashboard_answers_this_machine_only_and_asks_for_a_token(tmp_path: Path) -> None:
    # Without RAY_AUTH_MODE, as most people have it; Ray writes the token into the home directory.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [page] = [line for line in done.stdout.splitlines() if line.startswith("page ")]
    assert page.startswith("page 127.0.0.1:")
    assert page.endswith(" 401")
    token = tmp_path / ".ray" / "auth_token"
    assert token.read_text() not in done.stdout + done.stderr
