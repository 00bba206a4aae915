"""The watcher of a worker node, against stand-ins of the clouds' metadata services."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deploy import metadata
from tests.deploy.test_recipes import DEPLOY, recorder
from tests.ran import ran
from tests.waiting import until

INSIDE = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
SCRIPT = DEPLOY / "watch_node.sh"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> None:
    if subprocess.run([*INSIDE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs root and PID namespaces")
    recorder(
        tmp_path / "ray", f"echo $* >>{tmp_path}/said; exit 1"
    )  # so drain.sh does not wait for its deadline
    recorder(tmp_path / "sudo", f"echo $* >>{tmp_path}/asked")
    recorder(tmp_path / "raylet", "sleep 60; true")


@contextmanager
def watched(
    cloud: str, folder: Path, patience: int, raylet: bool
) -> Iterator["subprocess.Popen[bytes]"]:
    server = metadata.serve(cloud, 0, folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    line = (
        f"{folder}/raylet --node_id=abc &" * raylet + f" bash {SCRIPT} {patience} 0.1 >{folder}/log"
    )
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "METADATA_URL": address, "AZURE_URL": address}
    process = subprocess.Popen([*INSIDE, "bash", "-c", line], env=environment)
    try:
        until(lambda: (folder / "log").exists() and "watching" in (folder / "log").read_text(), 30)
        yield process
    finally:
        process.kill()
        process.wait()
        server.shutdown()


@pytest.mark.parametrize(("cloud", "seconds"), [("ec2", 100), ("gce", 20), ("azure", 20)])
def test_a_notice_of_the_cloud_drains_the_node(cloud: str, seconds: int, tmp_path: Path) -> None:
    with watched(cloud, tmp_path, 60, raylet=True) as process:
        assert not (tmp_path / "said").exists()
        (tmp_path / "notice").touch()
        process.wait(30)
    drain, stop = (tmp_path / "said").read_text().splitlines()
    assert drain.startswith("drain-node --node-id abc --reason DRAIN_NODE_REASON_PREEMPTION ")
    assert (drain.split()[-1], stop) == (str(seconds), "stop --force")
    assert not (tmp_path / "asked").exists()


AZURE_CALL = "POST /subscriptions/s/virtualMachines/node/deallocate Bearer secret"


@pytest.mark.parametrize(
    ("cloud", "call"),
    [("ec2", "shutdown -h now"), ("gce", "shutdown -h now"), ("azure", AZURE_CALL)],
)
def test_a_node_without_its_head_ends_itself(cloud: str, call: str, tmp_path: Path) -> None:
    with watched(cloud, tmp_path, 1, raylet=False):
        until((tmp_path / "asked").exists, 30)
    assert (tmp_path / "asked").read_text().splitlines()[0] == call


def test_a_machine_that_is_no_clouds_is_left_alone(tmp_path: Path) -> None:
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "METADATA_URL": "http://127.0.0.1:9"}
    done = ran(["bash", SCRIPT, "0"], env=environment)
    assert "this node is not watched" in done.stdout
