"""What a worker takes, and what the cluster could hold: now, and once its autoscaler has done what it may."""

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from olora_ray.config.evaluation import AnyConfig

Resources = Mapping[str, float]
"""Name -> amount."""
LAUNCHER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""Where Ray's cluster launcher puts cluster.yaml on the head: the open-source autoscaler tells nobody its limits."""
HEAD = "node:__internal_head__"
"""A resource that Ray gives to the head only."""
UNLIMITED = 1_000_000


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
    free: Mapping[str, Resources] = ray._private.state.state.available_resources_per_node()  # there is no public way
    return sum(_fit(wanted, free.get(node["NodeID"], {})) for node in schedulable_nodes())


def schedulable_nodes() -> list[dict[str, Any]]:
    """Ray's entries of the nodes that are alive and not about to be taken away."""
    leaving = set(ray._private.state.state.get_draining_nodes())  # there is no public way
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def present() -> list[Nodes]:
    """The nodes that stay, whatever is in use on them."""
    return [Nodes(node["Resources"], 1) for node in schedulable_nodes()]


def autoscaler_limits() -> list[Nodes]:
    """All worker nodes that the autoscaler may start, those that run already included; empty if nothing is known."""
    # Other than the launcher's, autoscalers may keep their limits in the control store.
    told = ray._private.state.state.get_cluster_config()
    if told is not None:
        groups = [(dict(group.resources), group.max_count) for group in told.node_group_configs]
        return [Nodes(each, UNLIMITED if most < 0 else most) for each, most in groups]
    here: Any = ray._private.worker._global_node
    if here is None or here.is_head():
        return []  # a process of Ray's, or a Ray that this process has started for itself
    tree: Any = None
    with contextlib.suppress(OSError, yaml.YAMLError):
        tree = yaml.safe_load(LAUNCHER_CONFIG.expanduser().read_text(encoding="utf-8"))
    return _launched(tree) if isinstance(tree, dict) else []


def maximum() -> list[Nodes]:
    """The cluster once all is started that may be: what is there now, if there is no autoscaler or none that tells."""
    more = autoscaler_limits()
    return [*more, *(one for one in present() if HEAD in one.resources)] if more else present()


def room(wanted: Resources, nodes: Iterable[Nodes]) -> int:
    """Workers of `wanted` resources that fit on these nodes when nothing else runs there."""
    return sum(_fit(wanted, one.resources) * one.count for one in nodes)


def amount(name: str, nodes: Iterable[Nodes]) -> float:
    """How much of a resource these nodes have together."""
    return sum(one.resources.get(name, 0.0) * one.count for one in nodes)


class PlacementRequest:
    """A wish for room for some workers that an autoscaler sees, for as long as it is entered.

    It ends with the job that has it: `ray.autoscaler.sdk.request_resources` would stay after a job that was
    killed, and its nodes with it.
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
        """Whether the room is asked for now; call it again and again."""
        if self._group is None and time.monotonic() - self._since >= self.after:
            self._group = ray.util.placement_group([dict(self.wanted)] * self.count, strategy="PACK")
            self._met = self._group.ready()
        # Room that was found is reserved for the wish: it must be free for those who will use it.
        elif self._group is not None and ray.wait([self._met], timeout=0)[0]:
            self._drop()
        return self._group is not None

    def _drop(self) -> None:
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group, self._since = None, time.monotonic()


def _launched(tree: Mapping[str, Any]) -> list[Nodes]:
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
    # Fractions of a CPU add up to a little more or less than they should.
    return min((int(free.get(name, 0.0) / each + 1e-6) for name, each in wanted.items() if each), default=0)
