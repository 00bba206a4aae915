"""Placement groups that outlive their maker are given back; those in use are left alone."""

from collections.abc import Callable
from typing import Any

import pytest

from olora_ray.cluster.resources import free_abandoned
from tests.waiting import until

pytestmark = pytest.mark.ray


def test_only_groups_of_dead_actors_are_freed(ray_with: Callable[[int], None]) -> None:
    import ray
    from ray.util.placement_group import placement_group

    ray_with(3)

    class Controller:
        def take(self) -> bool:
            self.group = placement_group([{"CPU": 1}])
            return bool(self.group.wait(30))

    maker: Any = ray.remote(Controller)
    dies, lives = maker.options(num_cpus=0).remote(), maker.options(num_cpus=0).remote()
    ours = placement_group([{"CPU": 1}])
    assert ours.wait(30)
    assert ray.get([dies.take.remote(), lives.take.remote()]) == [True, True]
    assert free_abandoned() == 0
    ray.kill(dies)
    until(lambda: free_abandoned() == 1)
    assert free_abandoned() == 0
    until(lambda: ray.available_resources().get("CPU", 0) == 1)
