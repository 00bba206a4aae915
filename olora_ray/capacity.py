"""What a worker takes, and how many more of them the cluster could hold."""

from collections.abc import Mapping

import ray

from olora_ray.config import Config


def worker_resources(config: Config) -> dict[str, float]:
    """What one worker takes: CPUs, and GPUs if the config or the cluster says so."""
    gpus = config.cluster.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    wanted = {"CPU": float(config.cluster.cpus_per_worker)}
    return wanted | ({"GPU": float(gpus)} if gpus else {})


def free_workers(wanted: Mapping[str, float]) -> int:
    """Workers of `wanted` resources (name -> amount) that fit in what is free now, nodes that are leaving left out."""
    leaving = set(ray._private.state.state.get_draining_nodes())  # there is no public way
    free: Mapping[str, Mapping[str, float]] = ray._private.state.available_resources_per_node()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return sum(_fit(wanted, free.get(node, {})) for node in alive - leaving)


def _fit(wanted: Mapping[str, float], free: Mapping[str, float]) -> int:
    # Fractions of a CPU add up to a little more or less than they should.
    return min((int(free.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items() if amount), default=0)
