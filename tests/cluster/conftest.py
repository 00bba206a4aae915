"""What the tests of workers without Ray share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from olora_ray.cluster import start
from olora_ray.cluster.worker import StopRequests


@pytest.fixture(scope="session", autouse=True)
def nobody_asks_to_stop() -> Iterator[None]:
    """The channels of these tests are no actors, and cannot be waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequests, "_listen", lambda self: None)
        yield


@pytest.fixture
def without_new_factors(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have an initialisation fail from now on."""
    return lambda: monkeypatch.setattr(start, "new_factors", None)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without a token, no Ray on this machine, and nothing of either in the environment."""
    for name in ("ADDRESS", "AUTH_MODE", "AUTH_TOKEN", "AUTH_TOKEN_PATH", "USE_TLS"):
        monkeypatch.setenv(f"RAY_{name}", "")  # so that what the code sets is taken back
        monkeypatch.delenv(f"RAY_{name}")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path
