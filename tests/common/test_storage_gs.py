"""The storage module on gs://, with pyarrow's own client: its listings have no folders that nobody has made."""

from collections.abc import Iterator

import pyarrow as pa
import pytest

from olora_ray.common import retry, storage
from olora_ray.common.errors import StoreError, TryAgain
from olora_ray.train import checkpoint, checkpoints
from tests.gs_server import BUCKET, GsServer, gs_server

PLACE = f"gs://{BUCKET}/runs"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[GsServer]:
    with gs_server(monkeypatch) as found:
        yield found


def test_checkpoints_are_found_again(server: GsServer) -> None:
    """Else a run that was killed would begin at its first step, without a word."""
    place = storage.join(PLACE, "r", "checkpoints")
    for step in (50, 100):
        name = checkpoints.name_of(step)
        checkpoints.put(
            lambda folder: (folder / checkpoint.MANIFEST).write_text("{}"),
            storage.join(place, name),
        )
    assert checkpoints.names(place) == ["step-0000050", "step-0000100"]
    checkpoints.drop(storage.join(place, "step-0000050"))
    assert checkpoints.names(place) == ["step-0000100"]


def test_a_store_that_does_not_answer_may_answer_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        gs_server(monkeypatch, seconds=0),
        pytest.raises(
            TryAgain,
            match=r"^run\.storage: gs://silent/runs cannot be written: .*DEADLINE_EXCEEDED",
        ),
    ):
        storage.check_storage("gs://silent/runs", "run.storage")


@pytest.mark.parametrize(
    ("code", "later"),
    [
        ("UNAVAILABLE", True),
        ("INTERNAL", True),
        ("PERMISSION_DENIED", False),
        ("UNAUTHENTICATED", False),
    ],
)
def test_what_passes_by_itself(code: str, later: bool) -> None:
    assert (
        retry.transient(
            OSError(f"google::cloud::Status({code}: Permanent error, with a last message of x)")
        )
        is later
    )


def test_what_pyarrow_raises_is_the_error_of_a_store() -> None:
    """The thread that renews a lock lives on with an OSError only."""

    def unknown() -> None:
        raise pa.ArrowException("Unknown error: google::cloud::Status(UNKNOWN: Permanent error)")

    def no_address() -> None:
        raise pa.ArrowInvalid("Path cannot start with a separator ('/a')")

    with pytest.raises(StoreError):
        retry.with_retries("gs://unknown", unknown)
    with pytest.raises(ValueError):
        retry.with_retries("gs://unknown", no_address)
