"""Facts about each node of the cluster, asked there: versions, memory, and whether it sees the storage."""

import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from olora_ray.cluster import ray_internals
from olora_ray.common import node_cache, storage

PACKAGES = ("ray", "torch", "transformers")
FOR_SOME = ("bitsandbytes",)
"""Packages that only some runs need."""
WAIT = 60.0
"""Seconds that the nodes have to answer: a new one starts its first Python process."""


@dataclass(frozen=True)
class NodeInfo:
    """What one node has."""

    versions: dict[str, str | None]
    """python, olora_ray (which code), ray, torch, transformers; None: not installed."""
    memory: int
    """Bytes, or the container's limit."""
    gpu_memory: int | None = None
    """Bytes of the smallest GPU, or of the machine where it shares these; None without one."""
    storage_problem: str | None = None
    gpu_generation: tuple[int, int] | None = None
    """Compute capability of the oldest GPU, (8, 0) is Ampere; None without one of NVIDIA's."""


def node_info() -> NodeInfo:
    """Facts about this node; imports neither torch nor transformers."""
    versions = {name: _version(name) for name in (*PACKAGES, *FOR_SOME)}
    memory, oldest = ray_internals.system_memory(), min(ray_internals.gpu_generations(), default=None)
    # A GPU that is there and does not tell shares the machine's.
    gpu_memory = min(ray_internals.gpu_memory(), default=None if oldest is None else memory)
    versions = {"python": platform.python_version(), "olora_ray": f"code {node_cache.project()}", **versions}
    return NodeInfo(versions, memory, gpu_memory, gpu_generation=oldest)


def query_nodes(nodes: Sequence[dict[str, Any]], place: str) -> list[NodeInfo | str]:
    """What each of the nodes (entries of ray.nodes()) answers, or why it does not.

    Each of them reads a file that this process writes below `place`, and writes one of its own; both are
    removed. Raises OSError or ValueError if this process itself cannot write there.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = storage.join(place, f".probe-{uuid.uuid4().hex}")
    storage.write_text(storage.join(folder, "driver"), folder)
    try:
        asked = [
            ray.remote(_answer)
            .options(
                num_cpus=0,  # answers on a node that is busy
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(folder, node["NodeID"])
            for node in nodes
        ]
        ray.wait(asked, num_returns=len(asked), timeout=WAIT)
        return [_result(answer, folder, node["NodeID"]) for answer, node in zip(asked, nodes, strict=True)]
    finally:
        storage.remove(folder)


def _answer(folder: str, node: str) -> NodeInfo:
    """Runs on the node."""
    found = node_info()
    problem = None
    try:
        if storage.read_text(storage.join(folder, "driver")) != folder:
            problem = "reads something else than was written"
        # After the read: in a folder that is not shared this would stay, for the driver removes only its own.
        storage.write_text(storage.join(folder, node), node)
    except FileNotFoundError:
        problem = "is another place there than here: use a shared folder, s3:// or gs://"
    except (OSError, ValueError) as error:
        problem = f"cannot be read and written there: {_reason(error)}"
    return replace(found, storage_problem=problem)


def _result(answer: Any, folder: str, node: str) -> NodeInfo | str:
    try:
        found: NodeInfo = ray.get(answer, timeout=0)
    except TimeoutError:
        return f"did not answer within {WAIT:g} s"
    except RayTaskError as error:
        return f"cannot run this project: {_reason(error.cause or error)}; install it there"
    except RayError as error:
        return f"did not answer: {_reason(error)}"
    if found.storage_problem is None and not storage.exists(storage.join(folder, node)):
        return replace(found, storage_problem="what it writes does not arrive here")
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
