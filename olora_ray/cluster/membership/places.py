"""One placement group per worker, for workers that Ray Train can replace one by one.

In Ray 2.60 all workers of a group share one placement group. If a node dies, Ray at once and for ever searches another
node for the lost part of that placement group, while the other workers fill the remaining nodes. Its control store and
the dashboard's agent each keep a processor busy with that (ray-project/ray#65007). So here each worker has a placement
group of its own, pinned to its node: if the node dies, there is nothing to search. A replacement gets a new placement
group, for which Ray searches at growing intervals.

This module imports Ray Train's controller, which takes long: import it late.
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
"""Seconds to wait for a placement group on a node that had room a moment ago."""


def with_own_places(trainer: Any) -> Any:
    """Make the trainer's controller give each worker a placement group of its own, and return the trainer.

    Also removes two helper processes that Ray starts beside the workers: one for its datasets, and one that frees a
    dead controller's placement groups. Both import Ray Data or Ray Train, which slows the start of the workers on a
    machine with few CPUs. Neither is needed: a run has no Ray dataset, and the driver itself frees abandoned placement
    groups (resources.py).
    """
    callbacks = trainer._create_default_callbacks

    def create() -> list[Any]:
        return [UseOwnGroup(), *(each for each in callbacks() if not isinstance(each, train.unwanted_callbacks))]

    trainer._create_default_callbacks = create
    return trainer


class UseOwnGroup(train.ControllerCallback):  # type: ignore[misc, name-defined]  # not typed: looked up at run time
    def after_controller_start(self, train_run_context: Any) -> None:
        # Safe to set on the class: the controller's process has no other controller.
        train.TrainController.worker_group_cls = Group


class Group(train.WorkerGroup):  # type: ignore[misc, name-defined]
    """Ray Train's WorkerGroup, with one placement group per replaceable worker if the cluster has several nodes."""

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
        run_env = self._train_run_context.run_config.worker_runtime_env
        env = self._get_worker_runtime_env(custom_runtime_env=run_env or {})
        actor_class: Any = ray.remote(runtime_env=env, **train.bundle_to_remote_args(dict(resources_per_worker)))(
            self._worker_cls
        )
        chosen = list(range(num_workers)) if numbers is None else numbers
        workers = [
            train.Worker(actor, metadata, resources_per_worker, placement_group_bundle_index=number)
            for number, (actor, metadata) in start(actor_class, placement_group, chosen).items()
        ]
        ranked: list[Any] = train.WorkerGroup._assign_worker_ranks(workers, *ranks)
        return ranked


def start(actor_class: Any, places: "Places", numbers: Sequence[int]) -> dict[int, Any]:
    """Start an actor in the placement group of each worker number; return number -> (actor, its metadata).

    Raises WorkerGroupStartupFailedError, as Ray Train does, if an actor dies at its start.
    """

    def start_in(number: int) -> Any:
        in_group = PlacementGroupSchedulingStrategy(places.of(number), placement_group_bundle_index=0)
        actor = actor_class.options(scheduling_strategy=in_group).remote()
        return actor, actor.get_metadata.remote()

    started = {number: start_in(number) for number in numbers}
    while True:
        answers = [answer for _, answer in started.values()]
        waiting = ray.wait(answers, num_returns=len(answers), timeout=1.0)[1]
        lost = [number for number in started if not places.stand(number)]
        # If the node of a pinned placement group dies, its worker is dead, or would wait for that node for ever.
        for number in lost:
            ray.kill(started[number][0])
            started[number] = start_in(number)
        if not waiting and not lost:
            break
    try:
        return {number: (actor, ray.get(answer)) for number, (actor, answer) in started.items()}
    except RayActorError as error:
        for actor, _ in started.values():
            ray.kill(actor)
        raise train.WorkerGroupStartupFailedError(f"a worker could not start: {error}") from error


class Places(train.PlacementGroupHandle):  # type: ignore[misc, name-defined]
    """The placement groups of a group's workers, each pinned to a node.

    `together` is one placement group for all workers. It finds nodes with room for all of them at once; `wait` then
    replaces it by one placement group per worker on the same nodes. `resources` are a single worker's.
    """

    def __init__(self, together: Any, resources: Mapping[str, float]) -> None:
        self._together, self._resources = together, dict(resources)
        self._by_number: list[PlacementGroup] = []

    @property
    def placement_group(self) -> Any:
        # Ray passes this to `Group._create_workers`.
        return self

    def ready(self) -> Any:
        return self._together.ready()

    def wait(self, timeout_seconds: float = 30) -> bool:
        """True if all placement groups exist. False also if the room was lost while they were pinned."""
        if not self._together.wait(timeout_seconds):
            return False
        self._by_number = _pinned(self._together.placement_group, self._resources)
        return bool(self._by_number) and _created(self._by_number)

    def of(self, number: int) -> PlacementGroup:
        """Return a worker's placement group. If its node is gone, wait for room on any node and pin a new one there."""
        if not self.stand(number):
            remove_placement_group(self._by_number[number])
            self._by_number[number] = _anywhere(self._resources)
        return self._by_number[number]

    def stand(self, number: int) -> bool:
        """True if the node of a worker's placement group is alive, as far as Ray knows."""
        return bool(placement_group_table(self._by_number[number])["state"] == "CREATED")

    def shutdown(self) -> None:
        self._together.shutdown()
        for group in self._by_number:
            remove_placement_group(group)


def _anywhere(resources: Mapping[str, float]) -> PlacementGroup:
    """Wait for room for one worker on any node, and return a placement group pinned there."""
    while True:
        unpinned = placement_group([dict(resources)])
        while not unpinned.wait(PATIENCE):
            pass
        groups = _pinned(unpinned, resources)
        if groups and _created(groups):
            return groups[0]
        for group in groups:
            remove_placement_group(group)


def _pinned(together: PlacementGroup, resources: Mapping[str, float]) -> list[PlacementGroup]:
    """Replace a placement group by one per bundle, pinned to the bundle's node; empty if a node is gone."""
    nodes = placement_group_table(together)["bundles_to_node_id"]
    remove_placement_group(together)
    if not all(nodes.values()):
        return []
    # The nodes need a moment to get their resources back. Ray tries a request that comes too early again only after a
    # second.
    time.sleep(0.2)
    labels = [{NODE_ID_LABEL_KEY: nodes[number]} for number in sorted(nodes)]
    return [placement_group([dict(resources)], bundle_label_selector=[label]) for label in labels]


def _created(groups: Sequence[PlacementGroup]) -> bool:
    end = time.monotonic() + PATIENCE
    return all(group.wait(max(0.0, end - time.monotonic())) for group in groups)
