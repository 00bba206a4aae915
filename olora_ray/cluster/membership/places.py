"""A place of its own for each worker that Ray Train can replace. Imports Ray Train's controller: import it late.

In Ray 2.60 the workers of a group lie in one placement group. If a node dies, Ray looks for another place for what
was there, at once and for ever, while those that train on fill the nodes that are left: its control store and the
dashboard's agent each keep a processor busy (ray-project/ray#65007). So groups whose workers are replaced one by one
have a placement group for each worker, tied to its node: there is no other place for it. One for a replacement is new,
and Ray waits longer and longer before it tries that again.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import (
    NODE_ID_LABEL_KEY,
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from olora_ray.cluster import ray_internals

train = ray_internals.train_parts()

PATIENCE = 30.0
"""Seconds within which a place on a node has to be there that was free a moment ago."""


def with_own_places(trainer: Any) -> Any:
    """Return the trainer, with a controller as our workers need it (`OwnPlaces`), and less beside it.

    Ray starts a process for its datasets, and one that gives back a dead controller's room. Both have all imports of
    Ray Data or Train and come up beside the workers, which takes their time on a machine with few CPUs. No dataset is
    given, and the driver gives the room back (resources.py), without the dashboard that the helper asks.
    """
    callbacks = trainer._create_default_callbacks

    def create() -> list[Any]:
        return [OwnPlaces(), *(each for each in callbacks() if not isinstance(each, train.unwanted_callbacks))]

    trainer._create_default_callbacks = create
    return trainer


class OwnPlaces(train.ControllerCallback):  # type: ignore[misc, name-defined]  # not typed: looked up at run time
    """Has a controller make groups of this module's kind."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller's process, which has no other controller."""
        train.TrainController.worker_group_cls = Group


class Group(train.WorkerGroup):  # type: ignore[misc, name-defined]
    """Ray Train's, with a place of its own for each worker that can be replaced, where there are several nodes."""

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        together = super()._create_placement_group(scaling_config, worker_group_context)
        several = sum(node["Alive"] for node in ray.nodes()) > 1
        if not self._manages_replica_groups or not several:
            return together
        return Places(together, worker_group_context.resources_per_worker)

    def _create_workers(
        self,
        num_workers: int,
        placement_group: Any,
        resources_per_worker: dict[str, float],
        placement_group_bundle_indices: list[int] | None = None,
        starting_world_rank: int = 0,
        world_size: int | None = None,
        replica_group_size: int | None = None,
    ) -> list[Any]:
        numbers, ranks = placement_group_bundle_indices, (starting_world_rank, world_size, replica_group_size)
        if not isinstance(placement_group, Places):
            created: list[Any] = super()._create_workers(
                num_workers, placement_group, resources_per_worker, numbers, *ranks
            )
            return created
        asked = self._train_run_context.run_config.worker_runtime_env
        env = self._get_worker_runtime_env(custom_runtime_env=asked or {})
        kind: Any = ray.remote(runtime_env=env, **train.bundle_to_remote_args(dict(resources_per_worker)))(
            self._worker_cls
        )
        chosen = list(range(num_workers)) if numbers is None else numbers
        workers = [
            train.Worker(actor, metadata, resources_per_worker, placement_group_bundle_index=number)
            for number, (actor, metadata) in start(kind, placement_group, chosen).items()
        ]
        ranked: list[Any] = train.WorkerGroup._assign_worker_ranks(workers, *ranks)
        return ranked


def start(kind: Any, places: "Places", numbers: Sequence[int]) -> dict[int, Any]:
    """Start a worker, an actor of this `kind`, at each of the places; returns number -> (actor, its metadata).

    Raises what Ray Train's own does if one dies at its start.
    """

    def started_at(number: int) -> Any:
        place = PlacementGroupSchedulingStrategy(places.of(number), placement_group_bundle_index=0)
        actor = kind.options(scheduling_strategy=place).remote()
        return actor, actor.get_metadata.remote()

    started = {number: started_at(number) for number in numbers}
    while True:
        told = [answer for _, answer in started.values()]
        waiting = ray.wait(told, num_returns=len(told), timeout=1.0)[1]
        lost = [number for number in started if not places.stand(number)]
        for number in lost:  # the node has died meanwhile: its worker is dead, or would wait for ever
            ray.kill(started[number][0])
            started[number] = started_at(number)
        if not waiting and not lost:
            break
    try:
        return {number: (actor, ray.get(told)) for number, (actor, told) in started.items()}
    except RayActorError as error:
        for actor, _ in started.values():
            ray.kill(actor)
        raise train.WorkerGroupStartupFailedError(f"a worker could not start: {error}") from error


class Places(train.PlacementGroupHandle):  # type: ignore[misc, name-defined]
    """The places of a group's workers: a placement group for each, tied to the node where there was room for all."""

    def __init__(self, together: Any, resources: Mapping[str, float]) -> None:
        """`together`: one for all of them; `resources`: of one worker."""
        self._together, self._resources = together, dict(resources)
        self._each: list[PlacementGroup] = []

    @property
    def placement_group(self) -> Any:
        """What Ray hands on to `Group._create_workers`."""
        return self

    def ready(self) -> Any:
        """See PlacementGroupHandle."""
        return self._together.ready()

    def wait(self, timeout_seconds: float = 30) -> bool:
        """See PlacementGroupHandle; false too if the room is gone again: others have taken it, or a node has died."""
        if not self._together.wait(timeout_seconds):
            return False
        self._each = _tied(self._together.placement_group, self._resources)
        return bool(self._each) and _found(self._each)

    def of(self, number: int) -> PlacementGroup:
        """Return the place of a worker; another one if its node is gone, once there is room for it."""
        if not self.stand(number):
            remove_placement_group(self._each[number])
            self._each[number] = _wherever(self._resources)
        return self._each[number]

    def stand(self, number: int) -> bool:
        """True if the node of a worker's place is there, as far as Ray knows."""
        return bool(placement_group_table(self._each[number])["state"] == "CREATED")

    def shutdown(self) -> None:
        """See PlacementGroupHandle."""
        self._together.shutdown()
        for each in self._each:
            remove_placement_group(each)


def _wherever(resources: Mapping[str, float]) -> PlacementGroup:
    """Return a place for one worker on any node, once there is room."""
    while True:
        anywhere = placement_group([dict(resources)])
        while not anywhere.wait(PATIENCE):
            pass
        tied = _tied(anywhere, resources)
        if tied and _found(tied):
            return tied[0]
        for each in tied:
            remove_placement_group(each)


def _tied(together: PlacementGroup, resources: Mapping[str, float]) -> list[PlacementGroup]:
    """Replace a placement group by one for each bundle, on the same nodes; none if a node is gone."""
    nodes = placement_group_table(together)["bundles_to_node_id"]
    remove_placement_group(together)
    if not all(nodes.values()):
        return []
    time.sleep(0.2)  # until the nodes have back what it had: who asks before, waits a second for the next try
    labels = [{NODE_ID_LABEL_KEY: nodes[number]} for number in sorted(nodes)]
    return [placement_group([dict(resources)], bundle_label_selector=[label]) for label in labels]


def _found(places: Sequence[PlacementGroup]) -> bool:
    """True if all of them are there within seconds."""
    end = time.monotonic() + PATIENCE
    return all(place.wait(max(0.0, end - time.monotonic())) for place in places)
