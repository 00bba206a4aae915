"""Placement groups whose Train controller has died, given back.

Ray itself frees them only when the whole job ends, so whoever waits for room would wait for ever. Train has a process
of its own for it beside each controller, which asks the dashboard: slow to start, and blind where no dashboard
runs. Our trainers go without (train_internals.adapted), and the driver does it.
"""

from olora_ray.cluster import ray_internals


def free_abandoned() -> int:
    """Remove this job's placement groups whose creating actor is dead; returns how many there were."""
    from ray.util.placement_group import remove_placement_group

    found = ray_internals.abandoned_placement_groups()
    for group in found:
        remove_placement_group(group)
    return len(found)
