"""Resources of a worker and of the cluster: as it is, and the largest that its autoscaler may make."""

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from olora_ray.cluster import ray_internals
from olora_ray.config.schema import AnyConfig

Resources = Mapping[str, float]
"""Name -> amount."""
LAUNCHER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""Where Ray's cluster launcher puts cluster.yaml on the head: the open-source autoscaler tells nobody its limits."""


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind."""

    resources: Resources
    """Of one of them."""
    count: int


def worker_resources(config: AnyConfig) -> dict[str, float]:
    """What one worker takes: CPUs, and GPUs if the config says so, or if the cluster has or can get any."""
    gpus = config.cluster.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if amount("GPU", [*present(), *autoscaler_limits()]) else 0.0
    wanted = {"CPU": float(config.cluster.cpus_per_worker)}
    return wanted | ({"GPU": float(gpus)} if gpus else {})


def free_workers(wanted: Resources) -> int:
    """Workers of `wanted` resources that fit in what is free now on nodes that stay."""
    free = ray_internals.free_resources()
    return sum(_fit(wanted, free.get(node["NodeID"], {})) for node in schedulable_nodes())


def schedulable_nodes() -> list[dict[str, Any]]:
    """Ray's entries of the nodes that are alive and not being drained."""
    leaving = ray_internals.draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def own_node(processes: int, memory: float) -> dict[str, float]:
    """A resource that brings a process to the node of this one, if so many have room there, of `memory` bytes each.

    Nothing if they have not, if the node is being drained, or if no Ray runs.
    """
    if not ray.is_initialized():
        return {}
    own = ray.get_runtime_context().get_node_id()
    free = ray_internals.free_resources().get(own, {})
    address = next((node["NodeManagerAddress"] for node in schedulable_nodes() if node["NodeID"] == own), "")
    share = {f"node:{address}": 0.0001}  # each node has 1 of its own; Ray counts no smaller amount
    return share if _fit({**share, "memory": memory}, free) >= processes else {}


def present() -> list[Nodes]:
    """The nodes that stay, whatever is in use on them."""
    return [Nodes(node["Resources"], 1) for node in schedulable_nodes()]


def autoscaler_limits() -> list[Nodes]:
    """All worker nodes that the autoscaler may start, those that run already included; empty if nothing is known."""
    # Other than the launcher's, autoscalers may keep their limits in the control store.
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
    """The largest cluster that the autoscaler may make; the one of now if there is none, or none that tells."""
    more = autoscaler_limits()
    return [*more, *(one for one in present() if ray_internals.HEAD in one.resources)] if more else present()


def room(wanted: Resources, nodes: Iterable[Nodes]) -> int:
    """Workers of `wanted` resources that fit on these nodes when nothing else runs there."""
    return sum(_fit(wanted, one.resources) * one.count for one in nodes)


def amount(name: str, nodes: Iterable[Nodes]) -> float:
    """How much of a resource these nodes have together."""
    return sum(one.resources.get(name, 0.0) * one.count for one in nodes)


class PlacementRequest:
    """Asks the autoscaler for room for some workers, with a placement group, for as long as it is entered.

    It ends with its job: a request by `ray.autoscaler.sdk.request_resources` would outlive a job that was killed,
    and keep its nodes running.
    """

    def __init__(self, wanted: Resources, count: int, after: float) -> None:
        """Room for `count` workers of `wanted` resources, asked for when there was none for `after` seconds."""
        self.wanted, self.count, self.after = wanted, count, after
        self._group: Any = None
        self._since = time.monotonic()

    def __enter__(self) -> "PlacementRequest":
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def look(self) -> bool:
        """Ask for the room when it is time, withdraw when it is found; whether it is asked for now. Call it often."""
        if self._group is None and time.monotonic() - self._since >= self.after:
            self._group = ray.util.placement_group([dict(self.wanted)] * self.count, strategy="PACK")
            self._met = self._group.ready()
        # The placement group is only a signal to the autoscaler: free it once satisfied, so that the workers can
        # use the room.
        elif self._group is not None and ray.wait([self._met], timeout=0)[0]:
            self._drop()
        return self._group is not None

    def _drop(self) -> None:
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group, self._since = None, time.monotonic()


def launched(tree: Mapping[str, Any]) -> list[Nodes]:
    """The limits of a cluster.yaml; `max_workers` of the cluster caps the largest kinds first."""
    left = int(tree.get("max_workers", 2))
    kinds = [kind for name, kind in tree.get("available_node_types", {}).items() if name != tree.get("head_node_type")]
    found = []
    for kind in sorted(kinds, key=_size, reverse=True):
        most = min(left, int(kind.get("max_workers", left)))
        left -= most
        found.append(Nodes({name: float(value) for name, value in kind.get("resources", {}).items()}, most))
    return found


def _size(kind: Mapping[str, Any]) -> tuple[float, float]:
    resources = kind.get("resources", {})
    return float(resources.get("GPU", 0)), float(resources.get("CPU", 0))


def _fit(wanted: Resources, free: Resources) -> int:
    return min((_times(name, each, free.get(name, 0.0)) for name, each in wanted.items() if each), default=0)


def _times(name: str, each: float, free: float) -> int:
    """How often `each` of a resource fits in what is free of it."""
    # Fractions of a CPU add up to a little more or less than they should.
    if name != "GPU" or each >= 1:
        return int(free / each + 1e-6)
    # A part of a GPU lies on one GPU: of 0.4 there are two on each, and not five on two.
    whole, part = divmod(free + 1e-6, 1.0)
    return int(whole) * int(1 / each + 1e-6) + int(part / each + 1e-6)


def free_abandoned() -> int:
    """Remove this job's placement groups whose creating actor, a Train controller, is dead; returns their number."""
    from ray.util.placement_group import remove_placement_group

    found = ray_internals.abandoned_placement_groups() if ray.is_initialized() else []
    for group in found:
        remove_placement_group(group)
    return len(found)
