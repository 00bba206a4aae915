"""Checks before expensive work: whether the cluster has, or can get, what a run needs; all problems in one error."""

import logging
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from olora_ray.cluster import node_facts, resources
from olora_ray.cluster.node_facts import NodeInfo
from olora_ray.cluster.resources import Resources
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import of_problems
from olora_ray.common.text import plural
from olora_ray.config.load import override
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.model.folder import loaded_files
from olora_ray.model.load import pick_dtype
from olora_ray.model.quantised import KINDS
from olora_ray.model.source import BaseModel
from olora_ray.train import checkpoints
from olora_ray.train.estimate import PROCESS_BYTES, MemoryEstimate, answers_at_once, estimate

logger = logging.getLogger(__name__)

# Room for the workers by memory: of the GPUs, and of the nodes, which hold the base while it is loaded.


GIB = 2**30
COPIES = 5
"""Copies of the adapter that a worker with a GPU has in its node's memory at most: a checkpoint's factors, update, two
moments and best update."""
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""Precisions of a base as the headers of safetensors name them."""
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
    """The config with what `auto` stands for on these nodes: float32 and sdpa if a GPU is older than Ampere.

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


def memory_problems(
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
    ample = replace(size, activation_bytes=int(size.activation_bytes * 1.1))  # what a step may take beyond its plan
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
    length = config.data.length()
    while length >= 512:  # nobody is advised to shorten sequences to less than 256 tokens
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


Answers = list[tuple[str, NodeInfo]]
"""Address of a node, and what it says."""


def check(config: AnyConfig, base: BaseModel | None) -> None:
    """Raise UserError with everything that keeps the run from working on this cluster; needs ray.init.

    A run that fits only once the autoscaler has started nodes waits for them, and so does one with a range
    of workers: a line says so. Memory and disk are looked at for a training only: with a `base` and a whole Config.
    """
    wanted = resources.worker_resources(config)
    problems = list(_workers(config, wanted))
    answers, silent = _ask(config, resources.schedulable_nodes())
    problems += silent
    kind = KINDS.get(config.model.quantization)
    problems += version_problems(node_facts.node_info(), answers, None if kind is None else kind.library)
    problems += code_problems()
    problems += gpu_problems(wanted, answers)
    problems += _spares(config, wanted)
    problems += _storage(config, answers)
    if base is not None and isinstance(config, Config):
        loaded = as_loaded(config, wanted, answers)
        size = _size(loaded, base, wanted, answers)
        problems += memory_problems(loaded, base, size, wanted, answers)
        problems += disk_problems(config, size, base)
    if problems:
        raise of_problems("the run cannot start here", problems)


def recomputes(config: Config, base: BaseModel) -> bool:
    """Whether blocks are run again in the backward pass, on this cluster; needs ray.init."""
    if config.train.activation_checkpointing != "auto":
        return config.train.activation_checkpointing
    wanted = resources.worker_resources(config)
    answers, _ = _ask(config, resources.schedulable_nodes())
    loaded = as_loaded(config, wanted, answers)
    size = estimate(loaded, base, gpu="GPU" in wanted)
    return with_recomputation(loaded, base, size, wanted, answers).recompute


def _size(config: Config, base: BaseModel, wanted: Resources, answers: Answers) -> MemoryEstimate:
    """What a worker needs; a line says what is not as people have been told."""
    planned = estimate(config, base, gpu="GPU" in wanted)
    size = with_recomputation(config, base, planned, wanted, answers)
    if size.problem:
        logger.info(
            f"memory: the plan is without {size.problem}: the model's code does not run without numbers; if memory runs"
            " out, set train.activation_checkpointing=true or lower train.micro_batch"
        )
    if size is not planned:
        logger.info(
            f"train.activation_checkpointing: auto: blocks are run again in the backward pass: a step takes"
            f" {size.activation_bytes / GIB:.2f} GiB instead of {planned.activation_bytes / GIB:.2f}, which"
            " would not fit"
        )
    return size


def _workers(config: AnyConfig, wanted: Resources) -> Iterator[str]:
    """Room for the fewest workers, now or later; and for Ray Data beside them."""
    cluster, nodes, later = config.cluster, resources.present(), resources.maximum()
    fewest = cluster.min_workers()
    now, most = resources.room(wanted, nodes), resources.room(wanted, later)
    fields = ", ".join(f"{kind.lower()}s_per_worker={each:g}" for kind, each in wanted.items())
    have = ", ".join(f"{resources.amount(kind, nodes):g} {kind}s" for kind in wanted)
    have += f", {plural(len(nodes), 'node')}"
    needs = f"cluster.workers={fewest} with {fields}: the cluster has room for {now} of them ({have})"
    if now < fewest <= most or (now < fewest and cluster.is_elastic()):
        logger.info(f"training waits for the cluster to grow: {needs}")
    elif now < fewest:
        limit = f" and can grow to {most}" if most > now else ""
        yield f"{needs}{limit}; use fewer workers, or cluster.workers=[MIN, MAX] to wait until the cluster grows"
    left = resources.amount("CPU", later) - cluster.max_workers() * wanted["CPU"]
    if len(nodes) > 1 and left < 1 and now >= fewest:
        logger.info(
            f"{cluster.max_workers()} workers leave {max(left, 0):g} CPUs for the preparation of data, which then"
            " runs slowly beside the training: add CPU nodes or lower cluster.cpus_per_worker"
        )


def _ask(config: AnyConfig, nodes: Sequence[dict[str, Any]]) -> tuple[Answers, list[str]]:
    """What the nodes say, and problems of those that do not."""
    if len(nodes) == 1 and not storage.is_uri(config.run.storage):
        return [
            (nodes[0]["NodeManagerAddress"], node_facts.node_info())
        ], []  # it is this one: RunFolder.check has written there
    try:
        found = node_facts.query_nodes(nodes, config.run.storage)
    except (OSError, ValueError) as error:
        return [], [f"run.storage: {config.run.storage} cannot be written: {error}"]
    named = [(node["NodeManagerAddress"], answer) for node, answer in zip(nodes, found, strict=True)]
    answers = [(address, answer) for address, answer in named if isinstance(answer, NodeInfo)]
    return answers, _grouped([(address, answer) for address, answer in named if isinstance(answer, str)])


def version_problems(here: NodeInfo, answers: Answers, library: str | None = None) -> list[str]:
    """Other versions than here; Python's last number and a build's tag (+cpu) may differ.

    Of the packages that only some runs need this one needs `library`.
    """
    found = []
    for address, info in answers:
        for package, wanted in here.versions.items():
            if package in node_facts.FOR_SOME and package != library:
                continue
            version = info.versions.get(package)
            if _public(package, version) != _public(package, wanted):
                shown = f"has {package} {version}" if version else f"has no {package}"
                found.append((address, f"{shown}, here it is {wanted}: install the same version on all nodes"))
    return _grouped(found)


def code_problems() -> list[str]:
    """Another copy of the project in the folder of now: Ray's workers look there first, and the driver does not.

    A checkout, say, from which a script is started that imports what was installed of an earlier one.
    """
    other = Path.cwd() / node_cache.PACKAGE.name
    if not (other / "__init__.py").is_file() or node_cache.project(other) == node_cache.project():
        return []
    return [
        f"{other} has other code than {node_cache.PACKAGE}, which this is, and the workers would take it: install it"
        " (pip install --no-deps .), or start from another folder"
    ]


def _public(package: str, version: str | None) -> str | None:
    if version is not None and package == "python":
        return ".".join(version.split(".")[:2])
    return version and version.partition("+")[0]


def _spares(config: AnyConfig, wanted: Resources) -> list[str]:
    if config.cluster.spares and "GPU" in wanted:
        return [
            f"cluster.spares={config.cluster.spares}: workers on GPUs are started again all together, and a spare has"
            " no GPU; use spares: 0"
        ]
    return []


def _storage(config: AnyConfig, answers: Answers) -> list[str]:
    told = [(address, info.storage_problem) for address, info in answers if info.storage_problem]
    return _grouped([(address, f"run.storage {config.run.storage} {problem}") for address, problem in told])


def gpu_problems(wanted: Resources, answers: Answers) -> list[str]:
    """Nodes whose GPUs the workers would get and could not use."""
    if "GPU" not in wanted:
        return []
    of_node = {node["NodeManagerAddress"]: node["Resources"] for node in resources.schedulable_nodes()}
    offering = [(address, info) for address, info in answers if of_node.get(address, {}).get("GPU")]
    return _grouped([(address, problem) for address, info in offering if (problem := unusable_gpu(info))])


def unusable_gpu(info: NodeInfo) -> str | None:
    """Why a node's GPUs cannot be used; None if they can, as far as is seen without using them."""
    torch, instead = info.versions["torch"] or "", "or set cluster.gpus_per_worker=0"
    if torch.endswith("+cpu"):
        return f"has GPUs, and torch {torch}, which is for CPUs only: install torch for CUDA there, {instead}"
    if info.gpu_memory is None and "+rocm" not in torch:
        return f"has GPUs that NVIDIA's driver does not show: mend the driver, {instead}"
    return None


def disk_problems(config: Config, size: MemoryEstimate, base: BaseModel) -> Iterator[str]:
    """Room in a local storage for tokens, checkpoints and exports, as far as they are not there yet.

    With another storage, room in the temporary folder of this node for what is uploaded from there.
    """
    checkpoint = 5 * 4 * size.trainable  # factors, update, two moments, the best
    exports = 2 * 4 * size.trainable + sum(file.stat().st_size for file in Path(base.folder).glob("*.safetensors"))
    if storage.is_uri(config.run.storage):
        temporary, need = tempfile.gettempdir(), checkpoint + exports
        if (free := shutil.disk_usage(temporary).free) < need:
            yield (
                f"run.storage: what is uploaded from {temporary} needs about {need / GIB:.2f} GiB there, and"
                f" {free / GIB:.2f} GiB are free; make room, or set TMPDIR to another place"
            )
        return
    place = Path(config.run.storage)
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    parts = {
        "tokens": _source_bytes(config),  # about as much as the text
        "checkpoints": (config.train.keep + 1) * checkpoint,
        "exports": exports,
    }
    # What lies there may be of other runs, and makes no room for the rest of this one.
    tokens = max(0, parts["tokens"] - _used(place / "tokens"))
    need = tokens + max(0, parts["checkpoints"] + parts["exports"] - _used(place / config.run.name))
    if (free := shutil.disk_usage(there).free) < need:
        shown = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
        yield (
            f"run.storage: the run needs about {need / GIB:.2f} GiB below {place} ({shown}), and {free / GIB:.2f} GiB"
            " are free; make room, or set another run.storage"
        )


def _source_bytes(config: Config) -> int:
    """Size of the sources that are single local files: others are looked at only when they are read."""
    paths = [Path(source.path) for source in (*config.data.train, *config.data.eval)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _used(folder: Path) -> int:
    return sum(
        os.path.getsize(os.path.join(root, name))
        for root, _, names in os.walk(folder)
        for name in names
        if os.path.exists(os.path.join(root, name))
    )


def _grouped(found: Sequence[tuple[str, str]]) -> list[str]:
    """`node A, B and 3 more: problem` for each problem."""
    nodes: dict[str, list[str]] = {}
    for address, problem in found:
        nodes.setdefault(problem, []).append(address)
    return [f"{_named(addresses)}: {problem}" for problem, addresses in nodes.items()]


def _named(addresses: Sequence[str]) -> str:
    more = f" and {len(addresses) - 3} more" if len(addresses) > 3 else ""
    return f"node{'s' if len(addresses) > 1 else ''} {', '.join(addresses[:3])}{more}"
