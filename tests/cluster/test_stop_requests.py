"""Why a training ends, as its workers see it; without Ray."""

from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.cluster.worker import StopRequests


def requests(nodes: Any, peers: Any, asked: str | None) -> StopRequests:
    worker: Any = SimpleNamespace(rank=0, preempted_nodes=nodes)
    found = StopRequests(None, worker, peers)
    found.from_driver = asked
    return found


def test_workers_that_change_wait_for_nobody_when_they_stop() -> None:
    assert requests(lambda: pytest.fail("a barrier that waits for ever"), SimpleNamespace(), "SIGTERM").reason() == (
        "SIGTERM",
        False,
    )


def test_workers_that_do_not_change_name_the_nodes_that_are_taken_away() -> None:
    assert requests(lambda: ("0123456789",), None, None).reason() == ("node 01234567 is preempted", True)
    assert requests(lambda: ("0123456789",), None, "SIGTERM").reason() == ("SIGTERM", False)
