"""Why a training ends, as its workers see it; without Ray."""

from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.cluster.preemption import StopRequests


class Preempted:
    """Notices of nodes that are taken away."""

    def announced(self) -> bool:
        return True

    def node_ids(self) -> tuple[str, ...]:
        return ("0123456789",)


class Barrier(Preempted):
    """As Ray's, while a worker of the trainer is absent."""

    def node_ids(self) -> tuple[str, ...]:
        pytest.fail("waits for ever")


def requests(preemption: Preempted, mesh: Any, asked: str | None) -> StopRequests:
    found = StopRequests(None, SimpleNamespace(rank=0, preemption=preemption), mesh)
    found.from_driver = asked
    return found


def test_workers_that_change_wait_for_nobody_when_they_stop() -> None:
    assert requests(Barrier(), SimpleNamespace(), "SIGTERM").reason() == ("SIGTERM", False)


def test_workers_that_do_not_change_name_the_nodes_that_are_taken_away() -> None:
    assert requests(Preempted(), None, None).reason() == ("node 01234567 is preempted", True)
    assert requests(Preempted(), None, "SIGTERM").reason() == ("SIGTERM", False)
