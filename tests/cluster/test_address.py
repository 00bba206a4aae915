"""Which Ray is used, and one that is not there, or not for us, is found out in seconds and named."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from olora_ray.cluster import address
from tests.cluster import fake_head
from tests.ran import ran
from tests.ray_head import free_port
from tests.recovery import processes
from tests.refused import refused
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this machine at which a Ray head answers."""
    with fake_head.head() as found:
        yield found


@pytest.mark.parametrize("given", [None, "", "auto", "local"])
def test_without_a_ray_the_run_gets_its_own(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert address.find() == "local"


def test_ray_address_comes_before_the_ray_of_this_machine(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path, free_port())
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert address.find() == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ray://127.0.0.1:10001", "ray job submit"),
        ("head", "HOST:PORT"),
    ],
)
def test_an_address_that_is_none_of_a_head_is_refused(
    given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    with refused(expected) as caught:
        address.find()
    assert f"RAY_ADDRESS={given}" in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_address_at_which_nothing_answers_is_named(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f"{host}:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", given)
    with refused(f"RAY_ADDRESS={given}: no Ray answers there"):
        address.find(patience=0)


def test_a_ray_of_this_machine_that_has_died_is_named(tmp_path: Path) -> None:
    port = free_port()
    started(tmp_path, port)  # as after a power cut: nothing has removed the file
    with refused(f"127.0.0.1:{port}"):
        address.find(patience=0)


def test_a_ray_of_another_version_is_refused(tmp_path: Path) -> None:
    with fake_head.head("2.1.0") as port:
        started(tmp_path, port)
        with refused(f"127.0.0.1:{port}: runs Ray 2.1.0"):
            address.find()


def started(folder: Path, port: int) -> None:
    """What `ray start --head` leaves behind."""
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")


ENDS = {
    "the driver is killed": (
        "assert address.join_or_start(); os.kill(os.getpid(), signal.SIGKILL)",
        -signal.SIGKILL,
    ),
    # Like every run, it disconnects before its Ray ends.
    "the end": (
        "assert address.join_or_start(); print(os.environ['RAY_AUTH_MODE']); ray.shutdown()",
        0,
    ),
}


@pytest.mark.ray
@pytest.mark.parametrize("end", ENDS)
def test_the_ray_that_starts_beside_the_drivers_imports_ends_with_the_driver(end: str) -> None:
    code, expected = ENDS[end]
    whole = f"import os, signal, ray\nfrom olora_ray.cluster import address\nwith address.begun(): {code}"
    with processes.scratch() as folder:
        environment = {**os.environ, "RAY_TMPDIR": str(folder)}
        done = ran([sys.executable, "-c", whole], code=expected, env=environment)
        assert done.stdout == ("token\n" if end == "the end" else ""), (
            "it asks for this user's token, as ray.init's"
        )
        until(lambda: not processes.processes_of(folder), 20)
