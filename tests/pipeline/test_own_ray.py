"""A Ray of our own that cannot be started for a reason which the user can mend."""

import pytest
import ray
from ray._private.utils import validate_socket_filepath

from olora_ray.cluster import address
from olora_ray.common.errors import UserError
from olora_ray.pipeline import connection

LONG = "/scratch/projects/language/models/jobs/1234567"
SOCKET = f"{LONG}/ray/session_2026-11-27_10-12-50_123456_123456/sockets/plasma_store"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(connection._PRESTART, "0")
    monkeypatch.setattr(address, "make_own", lambda: None)


def test_a_temporary_folder_with_a_long_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers set TMPDIR to a folder of the job; Ray ended in a traceback."""
    monkeypatch.setattr(ray, "init", lambda **_: validate_socket_filepath(SOCKET))
    with pytest.raises(
        UserError, match=rf"^RAY_TMPDIR: Ray's files would lie in {LONG}/ray, and that path is too long"
    ):
        connection._init(address.OWN)


def test_another_error_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray, "init", full)
    with pytest.raises(OSError, match="No space left"):
        connection._init(address.OWN)
