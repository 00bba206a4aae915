"""Resources that nobody will give back: placement groups whose Train controller has died.

Train frees them with a cleaner that asks the dashboard's State API, which may be missing or confused; Ray
itself frees them only when the whole job ends. A search would wait for them for ever.
"""

from typing import Any

import ray


def free_abandoned() -> int:
    """Remove this job's placement groups whose creating actor is dead; returns how many there were."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    found = _abandoned()
    for identity in found:
        remove_placement_group(PlacementGroup(PlacementGroupID(identity)))
    return len(found)


def _abandoned() -> list[bytes]:
    # There is no public way to learn who made a group, and whether that actor still lives.
    from ray.core.generated import gcs_pb2

    table: Any = vars(gcs_pb2)["PlacementGroupTableData"]
    state: Any = ray._private.state.state
    job = ray.get_runtime_context().get_job_id()
    groups = (table.FromString(raw) for raw in state._connect_and_get_accessor().get_placement_group_table())
    return [group.placement_group_id for group in groups if group.creator_job_id.hex() == job and _left(group, table)]


def _left(group: Any, table: Any) -> bool:
    from ray._raylet import ActorID

    # What the driver itself has made, as Tune does for its trials, has no creating actor.
    by_actor = not ActorID(group.creator_actor_id).is_nil()
    return bool(by_actor and group.creator_actor_dead and group.state != table.REMOVED)
