"""A Ray that is not there is found out in seconds, and named."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private import services

from olora_ray.cluster import address
from olora_ray.common.errors import UserError
from tests.ray_head import free_port


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray on this machine, and none in the file of the last `ray start`."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", set)


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this machine at which something answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("given", [None, "", "auto", "local"])
def test_without_a_ray_the_run_gets_its_own(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert address.find() == "local"


def test_ray_address_comes_before_the_ray_of_this_machine(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path, free_port())
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert address.find() == f"127.0.0.1:{port}"


def test_the_ray_of_this_machine_is_used(port: int, tmp_path: Path) -> None:
    started(tmp_path, port)
    assert address.find() == f"127.0.0.1:{port}"


def test_one_that_disappears_meanwhile_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # Just killed: its process is still listed, its port is closed already.
    listed = [{f"127.0.0.1:{free_port()}"}]
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: listed.pop() if listed else set())
    assert address.find() == "local"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://127.0.0.1:8265", "ray job submit"),
        ("ray://127.0.0.1:10001", "ray job submit"),
        ("head", "HOST:PORT"),
        ("head:many", "HOST:PORT"),
    ],
)
def test_an_address_that_is_none_of_a_head_is_refused(
    given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(UserError, match=expected) as caught:
        address.find()
    assert f"RAY_ADDRESS={given}" in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_address_at_which_nothing_answers_is_named(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = f"{host}:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={given}: no Ray answers there"):
        address.find(patience=0)


def test_a_ray_of_this_machine_that_has_died_is_named(tmp_path: Path) -> None:
    port = free_port()
    started(tmp_path, port)  # as after a power cut: nothing has removed the file
    with pytest.raises(UserError, match=f"127.0.0.1:{port}.*ray stop"):
        address.find(patience=0)


def started(folder: Path, port: int) -> None:
    """What `ray start --head` leaves behind."""
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
