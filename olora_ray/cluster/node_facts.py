"""Facts that each node of the cluster reports about itself: versions, memory, and access to the storage."""

import contextlib
import logging
import platform
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from olora_ray.cluster import ray_internals
from olora_ray.common import node_cache, storage
from olora_ray.common.device import memory_of
from olora_ray.common.errors import UserError
from olora_ray.config.tables import Table

logger = logging.getLogger(__name__)

PACKAGES = ("ray", "torch", "transformers")
FOR_SOME = ("bitsandbytes",)
"""Packages that only some runs need."""
WAIT = 60.0
"""Timeout for the nodes' answers. A new node first has to start a Python process."""


@dataclass(frozen=True)
class NodeInfo:
    versions: dict[str, str | None]
    """Package -> version, for python, olora_ray (a digest of its code), ray, torch, ..., and the plug-ins of a run;
    None if not installed."""
    memory: int
    """Bytes of the machine, or the limit of its container."""
    gpu_memory: int | None = None
    """Bytes of the smallest GPU; None without a GPU, and if NVIDIA's driver does not tell them (AMD, MIG, GB10)."""
    storage_problem: str | None = None
    gpu_generation: tuple[int, int] | None = None
    """Compute capability of the oldest GPU, (8, 0) for Ampere; None without an NVIDIA GPU."""
    driver_cuda: int | None = None
    """The newest major version of CUDA that NVIDIA's driver runs."""
    torch_cuda: int | None = None
    """The major version of CUDA that torch is built for; None for CPUs and AMD's GPUs."""
    gpu_free: int | None = None
    """Free bytes of the GPU with the least; None if no GPU reports them."""
    gpu_processes: tuple[int, ...] = ()
    """Ids of the processes that compute on the GPUs."""
    gpu_names: tuple[str, ...] = ()
    """The names of NVIDIA's GPUs."""


def node_info(plugins: Sequence[tuple[Table, str]] = ()) -> NodeInfo:
    """Return the facts about this node. Imports neither torch nor transformers, which would take seconds.

    `plugins` are the members that a run takes from installed packages.
    """
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "olora_ray": f"code {node_cache.project()}",
    }
    for package in (*PACKAGES, *FOR_SOME):
        versions[package] = None
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    for table, name in plugins:
        plugin = None
        with contextlib.suppress(UserError):
            plugin = table.plugin(name)
        shown = None
        if plugin is not None:
            shown = f"code {plugin.digest[:12]} of {plugin.package} {plugin.version}"
        versions[f"{table.group}:{name}"] = shown
    memory = ray_internals.system_memory()
    oldest = min(ray_internals.gpu_generations(), default=None)
    in_use = ray_internals.gpus_in_use()
    processes: list[int] = []
    for _, ids in in_use:
        processes += ids
    return NodeInfo(
        versions,
        memory,
        ray_internals.gpu_memory(),
        gpu_generation=oldest,
        driver_cuda=ray_internals.driver_cuda(),
        torch_cuda=_torch_cuda(),
        gpu_free=min((free for free, _ in in_use), default=None),
        gpu_processes=tuple(processes),
        gpu_names=tuple(ray_internals.gpu_names()),
    )


def query_nodes(
    nodes: Sequence[dict[str, Any]], location: str, plugins: Sequence[tuple[Table, str]] = ()
) -> list[NodeInfo | str]:
    """Return the facts about each node (an entry of ray.nodes()), or the reason why it does not answer.

    This process writes a file below `location`; each node reads it and writes a file of its own. All files are removed.
    Raises OSError or ValueError if this process cannot write there.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = storage.join(location, f".probe-{uuid.uuid4().hex}")
    storage.write_text(storage.join(folder, "driver"), folder)
    try:
        answers = [
            ray.remote(_answer)
            .options(
                num_cpus=0,  # so that a busy node answers, too
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(folder, node["NodeID"], plugins)
            for node in nodes
        ]
        limit = WAIT + _installation()
        ray.wait(answers, num_returns=len(answers), timeout=limit)
        return [
            _result(answer, folder, node["NodeID"], limit)
            for answer, node in zip(answers, nodes, strict=True)
        ]
    finally:
        storage.remove(folder)


def _answer(folder: str, node: str, plugins: Sequence[tuple[Table, str]]) -> NodeInfo:
    # Runs on the node. Each problem is shown after `node ADDRESS: run.storage LOCATION`.
    info = node_info(plugins)
    problem = None
    try:
        if storage.read_text(storage.join(folder, "driver")) != folder:
            problem = "returns other bytes there than were written here"
        # Only after the read has succeeded: in a folder that is not shared, nobody would remove this file.
        storage.write_text(storage.join(folder, node), node)
    except FileNotFoundError:
        problem = "is another folder there than here: use a shared folder, s3:// or gs://"
    except (OSError, ValueError) as error:
        problem = f"cannot be read and written there: {_reason(error)}"
    return replace(info, storage_problem=problem)


def gpu_memory_of(nodes: Sequence[dict[str, Any]], wanted: Mapping[str, float]) -> list[int | None]:
    """Return the bytes that torch has on a worker's GPU on each of these nodes; None if no GPU becomes free there."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    answers = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = {"num_cpus": 0, "num_gpus": wanted["GPU"], "scheduling_strategy": there}
        answers.append(ray.remote(_own_gpu).options(**options).remote(wanted["GPU"] >= 1))
    end = time.monotonic() + WAIT
    sizes: list[int | None] = []
    for answer in answers:
        size = None
        try:
            size = ray.get(answer, timeout=max(0.0, end - time.monotonic()))
        except (TimeoutError, RayError):
            ray.cancel(answer)
        sizes.append(size)
    return sizes


def _own_gpu(whole: bool) -> int | None:
    from olora_ray.cluster.worker_context import assigned_device

    memory = memory_of(assigned_device())
    if memory is None:
        return None
    free, total = memory
    return free if whole else total  # other workers may hold a part of it


@cache  # the nodes are asked several times, and the line is of use once
def _installation() -> float:
    """Return the seconds that a node may take to install the packages that the job brings; 0 if it brings none."""
    brought = ray.get_runtime_context().runtime_env
    if not brought.keys() & {"pip", "uv", "conda", "image_uri"}:
        return 0.0
    logger.info("waiting for the nodes, which install the packages that the job brings")
    seconds = float(brought.get("config", {}).get("setup_timeout_seconds", 600))
    return seconds if seconds > 0 else 86_400.0  # -1: without a limit


def _result(answer: Any, folder: str, node: str, limit: float) -> NodeInfo | str:
    try:
        info: NodeInfo = ray.get(answer, timeout=0)
    except TimeoutError:
        return f"did not answer within {limit:g} s"
    except RayTaskError as error:
        return f"cannot run this project: {_reason(error.cause or error)}; install it there"
    except RayError as error:
        return f"did not answer: {_reason(error)}"
    if info.storage_problem is None and not storage.exists(storage.join(folder, node)):
        problem = "does not show here the file that this node wrote there"
        return replace(info, storage_problem=problem)
    return info


def _torch_cuda() -> int | None:
    found = find_spec("torch")  # does not import it
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).with_name("version.py")
    if not file.exists():
        return None
    built = re.search(r"^cuda\b.*'(\d+)", file.read_text(), re.MULTILINE)
    return int(built[1]) if built else None


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
