"""Resources of a worker, of the cluster at present, and of the largest cluster that the autoscaler may start."""

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from olora_ray.cluster import ray_internals
from olora_ray.config.decided import AnyDecided
from olora_ray.config.schema import Cluster

Resources = Mapping[str, float]
"""Name -> amount: {"CPU": 2.0, "GPU": 1.0}."""
# Ray's cluster launcher puts cluster.yaml there on the head. The autoscaler itself does not publish its limits.
LAUNCHER_CONFIG = Path("~/ray_bootstrap_config.yaml")


@dataclass(frozen=True)
class Nodes:
    resources: Resources
    count: int


def has_gpus() -> bool:
    """True if the cluster has GPUs, or can get some."""
    return amount("GPU", [*present(), *autoscaler_limits()]) > 0


def worker_resources(config: AnyDecided) -> dict[str, float]:
    """Return the resources of one worker."""
    return of_worker(config.cluster, config.cluster.gpus_per_worker)


def of_worker(cluster: Cluster, gpus: float) -> dict[str, float]:
    wanted = {"CPU": float(cluster.cpus_per_worker)}
    if gpus:
        wanted["GPU"] = gpus
    return wanted


def free_workers(wanted: Resources) -> int:
    """Return how many workers of `wanted` resources fit in the free resources of the nodes that stay."""
    free = ray_internals.free_resources()
    return sum(fit(wanted, free.get(node["NodeID"], {})) for node in schedulable_nodes())


def schedulable_nodes() -> list[dict[str, Any]]:
    """Return Ray's entries of the nodes that are alive and not being drained."""
    leaving = ray_internals.draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def own_node(processes: int, memory: float) -> dict[str, float]:
    """Return the resource that places a process on this node, if it has room for `processes` of `memory` bytes each.

    Returns an empty dict without that room, on a node that is being drained, or without a running Ray.
    """
    if not ray.is_initialized():
        return {}
    own = ray.get_runtime_context().get_node_id()
    free = ray_internals.free_resources().get(own, {})
    address = next(
        (node["NodeManagerAddress"] for node in schedulable_nodes() if node["NodeID"] == own), ""
    )
    # Each node has 1.0 of this; 0.0001 is the smallest amount that Ray counts.
    share = {f"node:{address}": 0.0001}
    if fit({**share, "memory": memory}, free) < processes:
        return {}
    return share


def present() -> list[Nodes]:
    return [Nodes(node["Resources"], 1) for node in schedulable_nodes()]


def autoscaler_limits() -> list[Nodes]:
    """Return all worker nodes that the autoscaler may run, including the running ones; empty if unknown."""
    # Some autoscalers keep their limits in Ray's control store. The cluster launcher keeps them only in its own file.
    groups = ray_internals.autoscaler_groups()
    if groups is not None:
        return [Nodes(each, 1_000_000 if most < 0 else most) for each, most in groups]
    if not ray_internals.joined_running_node():
        return []
    tree: Any = None
    with contextlib.suppress(OSError, yaml.YAMLError):
        tree = yaml.safe_load(LAUNCHER_CONFIG.expanduser().read_text(encoding="utf-8"))
    return launched(tree) if isinstance(tree, dict) else []


def maximum() -> list[Nodes]:
    """Return the largest cluster that the autoscaler may start; the present cluster if no limits are known."""
    more = autoscaler_limits()
    now = present()
    if not more:
        return now
    return [*more, *(node for node in now if ray_internals.HEAD in node.resources)]


def room(wanted: Resources, nodes: Iterable[Nodes]) -> int:
    """Return how many workers of `wanted` resources fit on these nodes if nothing else runs there."""
    return sum(fit(wanted, node.resources) * node.count for node in nodes)


def rooms(wanted: Resources) -> tuple[int, int]:
    """Return `room` on the present cluster, and on the largest one that the autoscaler may start."""
    return room(wanted, present()), room(wanted, maximum())


def amount(name: str, nodes: Iterable[Nodes]) -> float:
    return sum(node.resources.get(name, 0.0) * node.count for node in nodes)


class PlacementRequest:
    """A request to the autoscaler for room for `count` workers of `wanted` resources, while the context is entered.

    `look` makes the request once the room has been missing for `after` seconds.
    """

    # A placement group, because it ends with its job. A request by `ray.autoscaler.sdk.request_resources` would outlive
    # a job that was killed, and keep its nodes running.

    def __init__(self, wanted: Resources, count: int, after: float) -> None:
        self.wanted, self.count, self.after = wanted, count, after
        self._group: Any = None
        self._since = time.monotonic()

    def __enter__(self) -> "PlacementRequest":
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def look(self) -> bool:
        """Make the request when it is due, and withdraw it when the room exists. True while it is made. Call often."""
        if self._group is None and time.monotonic() - self._since >= self.after:
            self._group = ray.util.placement_group(
                [dict(self.wanted)] * self.count, strategy="PACK"
            )
            self._met = self._group.ready()
        # The placement group is only a signal to the autoscaler. It is freed once it has its room, for the workers.
        elif self._group is not None and ray.wait([self._met], timeout=0)[0]:
            self._drop()
        return self._group is not None

    def _drop(self) -> None:
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group = None
            self._since = time.monotonic()


def launched(tree: Mapping[str, Any]) -> list[Nodes]:
    """Return the worker nodes that a cluster.yaml allows. The largest node types come first, up to its max_workers."""
    left = int(tree.get("max_workers", 2))
    types = [
        each
        for name, each in tree.get("available_node_types", {}).items()
        if name != tree.get("head_node_type")
    ]
    nodes = []
    for node_type in sorted(types, key=_size, reverse=True):
        most = min(left, int(node_type.get("max_workers", left)))
        left -= most
        each = {name: float(value) for name, value in node_type.get("resources", {}).items()}
        nodes.append(Nodes(each, most))
    return nodes


def _size(node_type: Mapping[str, Any]) -> tuple[float, float]:
    resources = node_type.get("resources", {})
    return float(resources.get("GPU", 0)), float(resources.get("CPU", 0))


def fit(wanted: Resources, free: Resources) -> int:
    """Return how many workers of `wanted` resources fit in the free resources of a node."""
    return min(
        (_times(name, each, free.get(name, 0.0)) for name, each in wanted.items() if each),
        default=0,
    )


def _times(name: str, each: float, free: float) -> int:
    # 1e-6: sums of fractions of a CPU have rounding errors.
    if name != "GPU" or each >= 1:
        return int(free / each + 1e-6)
    # Ray takes a part of a GPU from a single GPU: parts of 0.4 fit twice on each GPU, not five times on two GPUs.
    whole, part = divmod(free + 1e-6, 1.0)
    return int(whole) * int(1 / each + 1e-6) + int(part / each + 1e-6)


def free_abandoned() -> int:
    """Remove this job's placement groups whose creator, a controller of Ray Train, is dead; return their number."""
    from ray.util.placement_group import remove_placement_group

    if not ray.is_initialized():
        return 0
    groups = ray_internals.abandoned_placement_groups()
    for group in groups:
        remove_placement_group(group)
    return len(groups)
