"""How many more workers the cluster could hold, nodes that are taken away left out."""

from collections.abc import Mapping

import ray


def free_workers(wanted: Mapping[str, float]) -> int:
    """Workers of `wanted` resources (name -> amount) that fit in what is free now on nodes that stay."""
    leaving = set(ray._private.state.state.get_draining_nodes())  # there is no public way
    free: Mapping[str, Mapping[str, float]] = ray._private.state.available_resources_per_node()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return sum(_fit(wanted, free.get(node, {})) for node in alive - leaving)


def _fit(wanted: Mapping[str, float], free: Mapping[str, float]) -> int:
    # Fractions of a CPU add up to a little more or less than they should.
    return min((int(free.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items() if amount), default=0)
