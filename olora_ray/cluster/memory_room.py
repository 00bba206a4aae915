"""Room for the workers by memory: of the GPUs, and of the nodes, which hold the base while it is loaded."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from olora_ray.cluster import resources
from olora_ray.cluster.node_facts import NodeInfo
from olora_ray.cluster.resources import Resources
from olora_ray.common import storage
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model.folder import loaded_files
from olora_ray.model.load import pick_dtype
from olora_ray.model.source import BaseModel
from olora_ray.train import checkpoints
from olora_ray.train.answer_memory import answers_at_once
from olora_ray.train.estimate import PROCESS_BYTES, MemoryEstimate, estimate

GIB = 2**30
COPIES = 5
"""Copies of the adapter that a worker with a GPU has in its node's memory at most: a checkpoint's factors, update, two
moments and best update."""
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""Precisions of a base as the headers of safetensors name them."""
SHORTEST = 256
"""Tokens to which no sequence is advised to be shortened further."""
SPARE = 1.1
"""What a step may take of what it is planned to take, before `auto` has blocks run again."""


AMPERE = (8, 0)
"""Compute capability since which GPUs compute in bfloat16."""


@dataclass(frozen=True)
class Node:
    """A node that has room for workers but for its memory, which is asked here."""

    address: str
    info: NodeInfo
    fits: int
    """Workers by CPUs and GPUs."""


@dataclass(frozen=True)
class Need:
    """Memory of one kind that each worker needs."""

    kind: str
    size: float
    """Bytes."""
    have: Callable[[Node], float]
    """Bytes of a node, which all of its workers share, or `each` has for itself."""
    advice: str | None
    """What to do where it is missing; None: it depends on the size of the training."""
    each: bool = False

    def room(self, node: Node) -> int:
        """Workers that fit on a node."""
        if self.each:
            return node.fits if self.have(node) >= self.size else 0
        return min(node.fits, int(self.have(node) // self.size))


def as_loaded(config: Config, wanted: Resources, answers: Sequence[tuple[str, NodeInfo]]) -> Config:
    """The config with what `auto` stands for on these nodes, where a GPU is of before Ampere: float32, and sdpa.

    A run that is resumed stays in the precision that it began in (cluster/worker_context.py). A plan takes GPUs to
    compute in bfloat16, and to have flash attention (model/load.py, model/attention.py).
    """
    nodes = with_room(config, wanted, answers) if "GPU" in wanted else []
    began = checkpoints.precision_now(storage.join(config.folder(), "checkpoints"))
    before_ampere = min((node.info.gpu_generation or AMPERE for node in nodes), default=AMPERE) < AMPERE
    instead = {"model.dtype": began} if began else {}
    if before_ampere or ("GPU" in wanted and began == "float32"):
        instead = {"model.dtype": "float32", "model.attention": "sdpa"} | instead
    auto = {"model.dtype": config.model.dtype, "model.attention": config.model.attention}
    return override(config, {field: value for field, value in instead.items() if auto[field] == "auto"})


def problems(
    config: Config, base: BaseModel, size: MemoryEstimate, wanted: Resources, answers: Sequence[tuple[str, NodeInfo]]
) -> Iterator[str]:
    """What keeps the fewest workers of the config from fitting in memory, on the nodes that have room otherwise."""
    gpus = wanted.get("GPU", 0.0)
    nodes = with_room(config, wanted, answers)
    for need in needs(config, base, size, gpus) if nodes else ():
        if problem := no_room_for_spares(config, need, nodes):
            yield problem
        if problem := missing(config.cluster.min_workers(), need, nodes):
            yield f"{problem}; {need.advice or smaller(config, base, gpus, nodes)}"


def with_recomputation(
    config: Config, base: BaseModel, size: MemoryEstimate, wanted: Resources, answers: Sequence[tuple[str, NodeInfo]]
) -> MemoryEstimate:
    """The size if train.activation_checkpointing is auto and a step does not fit without; else the size as it is."""
    gpus, nodes = wanted.get("GPU", 0.0), with_room(config, wanted, answers)
    if config.train.activation_checkpointing != "auto" or not nodes:
        return size
    ample = replace(size, activation_bytes=int(size.activation_bytes * SPARE))
    if fits(config, base, ample, gpus, nodes):
        return size
    less = estimate(override(config, {"train.activation_checkpointing": True}), base, bool(gpus))
    return min(size, less, key=lambda one: one.activation_bytes)


def with_room(config: Config, wanted: Resources, answers: Sequence[tuple[str, NodeInfo]]) -> list[Node]:
    """The nodes that have room for workers by CPUs and GPUs; none if that is too little for the fewest."""
    if resources.room(wanted, resources.present()) < config.cluster.min_workers():
        return []
    of_node = {node["NodeManagerAddress"]: node["Resources"] for node in resources.schedulable_nodes()}
    return [
        Node(address, info, fits)
        for address, info in answers
        if (fits := resources.room(wanted, [resources.Nodes(of_node.get(address, {}), 1)]))
    ]


def fits(config: Config, base: BaseModel, size: MemoryEstimate, gpus: float, nodes: Sequence[Node]) -> bool:
    """Whether the fewest workers of the config have what they need that depends on the size of the training."""
    apart = size.offloaded_bytes > 0
    needed = (need for need in needs(config, base, size, gpus) if apart or need.advice is None)
    return all(missing(config.cluster.min_workers(), need, nodes) is None for need in needed)


def smaller(config: Config, base: BaseModel, gpus: float, nodes: Sequence[Node]) -> str:
    """The first of `changes` with which the workers fit, in words."""
    for change in changes(config, gpus):
        other = override(config, change)
        if fits(other, base, estimate(other, base, bool(gpus)), gpus, nodes):
            return f"it fits with {', '.join(f'{field}={str(value).lower()}' for field, value in change.items())}"
    return (
        "use nodes with more memory or a smaller model: none of train.activation_checkpointing, a smaller"
        " train.micro_batch or data.max_length, cluster.strategy=fsdp, cluster.fsdp_offload and model.dtype=bfloat16 is"
        " enough"
    )


def changes(config: Config, gpus: float = 0.0) -> Iterator[dict[str, Any]]:
    """What needs less memory than the config, what costs least first; each on top of those before it.

    Not another number of workers: the problem says for how many there is room. Fewer answers at once, alone or last.
    """
    yield from _fewer_answers(config)
    change: dict[str, Any] = {}
    if config.train.activation_checkpointing is not True:
        change["train.activation_checkpointing"] = True
        yield dict(change)
    micro = config.train.micro_batch
    while micro > 1:
        micro //= 2
        change["train.micro_batch"] = micro
        yield dict(change)
    if _may_shard(config):
        change["cluster.strategy"] = "fsdp"
        if config.cluster.fsdp_replicas > 1:  # without a use so far, and perhaps for another number of workers
            change["cluster.fsdp_replicas"] = 1
        yield dict(change)
    sharded = "cluster.strategy" in change or config.cluster.strategy == "fsdp"
    if gpus and sharded and config.cluster.min_workers() > 1 and not config.cluster.fsdp_offload:
        change["cluster.fsdp_offload"] = True
        yield dict(change)
    if config.model.dtype == "float32":
        change["model.dtype"] = "bfloat16"
        yield dict(change)
    length = config.data.max_length
    while length >= 2 * SHORTEST:
        length //= 2
        change["data.max_length"] = length
        yield dict(change)
    yield from (change | fewer for fewer in _fewer_answers(config))


def _may_shard(config: Config) -> bool:
    """Whether a base that each worker holds whole may be sharded instead; not a packed one, nor one with spares."""
    cluster = config.cluster
    whole = cluster.strategy == "ddp" and cluster.min_workers() > 1
    return whole and config.model.quantization == "none" and not cluster.spares


def _fewer_answers(config: Config) -> Iterator[dict[str, Any]]:
    """Held-out prompts that are answered and scored, so few that fewer are answered at once."""
    asked, count = config.evaluation, answers_at_once(config)
    while count > 1:
        count //= 2
        scored = {"evaluation.rows": min(asked.rows, count)} if asked.scorer else {}
        yield {"evaluation.samples": min(asked.samples, count), **scored}


def needs(config: Config, base: BaseModel, size: MemoryEstimate, gpus: float) -> Iterator[Need]:
    """What each worker needs that has `gpus` GPUs."""
    running = size.total_bytes() + PROCESS_BYTES
    stored, wanted = precisions(config, base, gpu=bool(gpus))
    converted = 0 if stored == NAMES[wanted] or size.by_rows else size.parameters * wanted.itemsize
    if not gpus:
        yield Need("memory", max(running, PROCESS_BYTES + converted), lambda node: node.info.memory, None)
        return
    yield Need("GPU memory", running, lambda node: _gpu_memory(node) * gpus, None, each=True)
    advice = "use fewer workers on a node: raise cluster.cpus_per_worker"
    if size.offloaded_bytes:
        advice += ", or set cluster.fsdp_offload=false"
    if converted:
        advice += f", or use a base that is stored in {NAMES[wanted]}: this one, in {stored}, is converted in memory"
    held = PROCESS_BYTES + converted + size.offloaded_bytes + COPIES * 4 * size.trainable
    yield Need("memory beside its GPU", held, lambda node: node.info.memory, advice)


def missing(fewest: int, need: Need, nodes: Sequence[Node]) -> str | None:
    """The problem if fewer than so many workers fit on these nodes."""
    room = sum(need.room(node) for node in nodes)
    if room >= fewest:
        return None
    each = " for each" if need.each else ""
    shown = ", ".join(f"node {node.address} has {need.have(node) / GIB:.1f} GiB{each}" for node in nodes[:4])
    return (
        f"cluster.workers={fewest}: each needs about {need.size / GIB:.1f} GiB of {need.kind}, so there is room for"
        f" {room} ({shown})"
    )


def no_room_for_spares(config: Config, need: Need, nodes: Sequence[Node]) -> str | None:
    """The problem if the spares have no room beside the fewest workers: they take memory, but no CPU."""
    cluster, room = config.cluster, sum(int(need.have(node) // need.size) for node in nodes)
    if need.each or not cluster.min_workers() <= room < cluster.min_workers() + cluster.spares:
        return None
    return (
        f"cluster.spares={cluster.spares}: each process needs about {need.size / GIB:.1f} GiB of {need.kind}, and"
        f" beside {cluster.min_workers()} workers there is room for {room - cluster.min_workers()}"
    )


def _gpu_memory(node: Node) -> float:
    """Bytes of each GPU of a node; without an end where nobody tells (AMD's)."""
    return math.inf if node.info.gpu_memory is None else node.info.gpu_memory


def precisions(config: Config, base: BaseModel, gpu: bool) -> tuple[str, torch.dtype]:
    """How most of a base's weights are stored, as a header names it, and how they are loaded.

    transformers maps the files where both are the same; otherwise each worker converts the whole base in memory of its
    own, unless it reads its part of a sharded one by rows, or packs it layer by layer.
    """
    auto_on_gpu = gpu and config.model.dtype == "auto"
    wanted = torch.bfloat16 if auto_on_gpu else pick_dtype(config.model, torch.device("cpu"))
    numbers: Counter[str] = Counter()
    for file in loaded_files(Path(base.folder)):
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  # not a dict
                    part = weights.get_slice(name)
                    numbers[part.get_dtype()] += math.prod(part.get_shape())
        except (OSError, SafetensorError):
            continue  # said when it is loaded
    return max(numbers, key=numbers.__getitem__, default=NAMES[wanted]), wanted
