"""What the tests of workers without Ray share."""

from collections.abc import Callable, Iterator

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
