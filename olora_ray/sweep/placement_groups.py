"""Abandoned placement groups of a search, given back: those whose Train controller has died.

Train frees them with a cleaner that asks the dashboard's State API, which may be missing or confused; Ray
itself frees them only when the whole job ends. A search would wait for their resources for ever.
"""

from olora_ray.cluster import ray_internals


def free_abandoned() -> int:
    """Remove this job's placement groups whose creating actor is dead; returns how many there were."""
    from ray.util.placement_group import remove_placement_group

    found = ray_internals.abandoned_placement_groups()
    for group in found:
        remove_placement_group(group)
    return len(found)
