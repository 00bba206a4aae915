"""When the driver looks for room for more workers."""

from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.pipeline.attempts import Attempts


@pytest.mark.parametrize(
    ("changing", "room", "interval", "pause"),
    [
        (False, 0, 60.0, 30.0),
        (False, 1, 60.0, 30.0),  # all would restart: others may use what is free for a moment
        (True, 0, 60.0, 5.0),
        (True, 1, 60.0, 1.0),
        (True, 0, 2.0, 1.0),
        (True, 1, 0.5, 0.25),
    ],
)
def test_room_that_was_found_is_looked_at_again_soon(changing: bool, room: int, interval: float, pause: float) -> None:
    cluster = SimpleNamespace(resize_interval=interval)
    driver: Any = SimpleNamespace(
        spec=SimpleNamespace(config=SimpleNamespace(cluster=cluster)), changing=changing, _room=room
    )
    assert Attempts._pause(driver) == pause
