"""Checks before expensive work: the cluster has, or can get, what a run needs. One error lists all problems."""

import contextlib
import logging
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from olora_ray.cluster import node_facts, ray_internals, resources
from olora_ray.cluster.node_facts import NodeInfo
from olora_ray.cluster.resources import Resources
from olora_ray.common import node_cache, storage, tried
from olora_ray.common.errors import of_problems
from olora_ray.common.text import plural, some
from olora_ray.config.decided import AnyDecided, DecidedConfig, Expected
from olora_ray.config.load import override
from olora_ray.config.schema import AnyConfig, Cluster, Config
from olora_ray.config.section import Source, is_auto
from olora_ray.config.tables import EXPORTERS, FORMATS, METHODS, OBJECTIVES, OPTIMIZERS, Table
from olora_ray.model.folder import loaded_files
from olora_ray.model.quantised import KINDS
from olora_ray.model.source import BaseModel
from olora_ray.train.estimate import MemoryEstimate, answers_at_once, estimate

logger = logging.getLogger(__name__)

# Memory for the workers: of the GPUs, and of the nodes, which hold the base while it is loaded.


GIB = 2**30
COPIES = 5
"""Copies of the adapter in the node's memory per worker with a GPU, at most: a checkpoint's factors, update, two
moments and best update."""
PROCESS_BYTES = 2**30
"""Approximate bytes of Python, torch and Ray in a worker, or of CUDA on its GPU."""
PEER_BYTES = 2**24
"""Approximate bytes of NCCL's connection to one other worker."""
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""Names of precisions in the headers of safetensors."""
ELSEWHERE = "if it runs on other machines, set RAY_ADDRESS to theirs"
RESUMED = (
    "this run keeps the micro-batch with which it began: use fewer workers per node (raise cluster.cpus_per_worker),"
    " cluster.strategy=fsdp, or another run.name"
)
AMPERE = (8, 0)
"""The lowest compute capability of GPUs that compute in bfloat16."""


@dataclass(frozen=True)
class Node:
    """A node with enough CPUs and GPUs for workers. Its memory is checked here."""

    address: str
    info: NodeInfo
    fits: int
    """Workers that fit by CPUs and GPUs."""


@dataclass(frozen=True)
class Need:
    memory: str
    """Name of the memory in messages."""
    size: float
    """Bytes per worker."""
    have: Callable[[Node], float]
    """Bytes of a node, shared by its workers; with `each`, bytes for each of its workers."""
    advice: str | None
    """The remedy if it is missing; None if a smaller training would help."""
    each: bool = False

    def room(self, node: Node) -> int:
        if self.each:
            return node.fits if self.have(node) >= self.size else 0
        return min(node.fits, int(self.have(node) // self.size))


@dataclass(frozen=True)
class ClusterFacts:
    """The facts about the cluster that decisions and checks need."""

    nodes: tuple[Node, ...]
    """The nodes on which workers fit by their CPUs and GPUs."""
    has_gpus: bool
    """True if the cluster has GPUs, or may get some."""
    workers_now: int
    """Number of workers that fit now, while other runs have their CPUs and GPUs."""
    workers_at_most: int
    """Number of workers that fit if nothing else runs; at least 1."""
    problems: tuple[str, ...] = ()
    """Problems of the nodes that prevent any run."""

    def with_room(self, fewest: int) -> tuple[Node, ...]:
        """Return the nodes for workers; none if `fewest` workers do not fit, which another check says."""
        room = sum(node.fits for node in self.nodes)
        return self.nodes if room >= fewest else ()

    @classmethod
    def here(cls, cluster: Cluster) -> "ClusterFacts":
        """Return the facts of this machine as a cluster of one node; needs no Ray."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        wanted = resources.of_worker(cluster, gpus_per_worker(cluster, gpus > 0))
        has = {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus)}
        room = resources.fit(wanted, has)
        node = Node("here", node_facts.node_info(), room)
        return cls((node,), gpus > 0, max(1, room), max(1, room))


def gpus_per_worker(cluster: Cluster, has_gpus: bool) -> float:
    """Return `cluster.gpus_per_worker` in a cluster with or without GPUs."""
    if is_auto(cluster.gpus_per_worker):
        return float(has_gpus)
    return cluster.gpus_per_worker


def ask(config: AnyConfig) -> ClusterFacts:
    """Ask the cluster for its facts; log what others hold of its GPUs. Needs ray.init."""
    has_gpus = resources.has_gpus()
    wanted = resources.of_worker(config.cluster, gpus_per_worker(config.cluster, has_gpus))
    schedulable = resources.schedulable_nodes()
    answers, silent = _answers(config, schedulable)
    of_node = {node["NodeManagerAddress"]: node for node in schedulable}
    nodes: list[Node] = []
    unsized = []
    for address, info in answers:
        fits = resources.fit(wanted, of_node[address]["Resources"])
        if fits and "GPU" in wanted and info.gpu_memory is None:
            unsized.append(Node(address, info, fits))
        elif fits:
            nodes.append(Node(address, info, fits))
    sizes = node_facts.gpu_memory_of([of_node[asked.address] for asked in unsized], wanted)
    for one, size in zip(unsized, sizes, strict=True):
        nodes.append(replace(one, info=replace(one.info, gpu_memory=size)))
    now, most = _room(wanted)
    packing = KINDS.get(config.model.quantization)
    library = None if packing is None else packing.library
    problems = [*silent]
    problems += version_problems(node_facts.node_info(plugins_in(config)), answers, library)
    for program in ("Ray", "MLflow"):
        tried.tell(program, version(program.lower()))
    problems += code_problems()
    problems += gpu_problems(wanted, answers)
    place = config.run.storage
    unusable = [
        (address, info.storage_problem) for address, info in answers if info.storage_problem
    ]
    problems += _grouped([(address, f"run.storage {place} {each}") for address, each in unusable])
    return ClusterFacts(tuple(nodes), has_gpus, now, most, tuple(problems))


def _room(wanted: Resources) -> tuple[int, int]:
    # Now, while other runs have their GPUs, and on the whole cluster.
    most = resources.room(wanted, resources.present())
    if not most:  # the autoscaler will start a node for the workers
        rooms = [resources.fit(wanted, node.resources) for node in resources.maximum()]
        most = max(rooms, default=0) or 1
        return most, most
    return min(resources.free_workers(wanted), most) or most, most


def memory_problems(
    config: DecidedConfig,
    base: BaseModel,
    size: MemoryEstimate,
    expected: Expected,
    nodes: Sequence[Node],
    kept: bool = False,
) -> Iterator[str]:
    """Yield each memory that the fewest workers lack, with advice; `kept`: the run resumes with its micro-batch."""
    if not nodes:
        return
    for need in needs(config, base, size, expected, nodes):
        problem = missing(config.cluster.fewest, need, nodes)
        if problem is None:
            continue
        advice = need.advice
        if advice is None and kept:
            advice = RESUMED
        yield f"{problem}; {advice or smaller(config, base, expected, nodes)}"


def refuse_here(
    config: DecidedConfig,
    base: BaseModel,
    size: MemoryEstimate,
    expected: Expected,
    cluster: ClusterFacts,
) -> None:
    """Raise UserError if this machine, without others, lacks memory. Nothing is said of GPUs."""
    # A config with GPUs, or more workers than this machine has processors, is for other machines.
    if cluster.has_gpus or expected.gpu:
        return
    nodes = cluster.with_room(config.cluster.fewest)
    problems = list(memory_problems(config, base, size, expected, nodes))
    if problems:
        problems[-1] += f"; {ELSEWHERE}"
        raise of_problems("the run cannot start here", problems)


def fits(
    config: DecidedConfig,
    base: BaseModel,
    size: MemoryEstimate,
    expected: Expected,
    nodes: Sequence[Node],
) -> bool:
    """True if the config's fewest workers fit, in the memory that depends on the size of the training."""
    if expected.gpu and unknown(nodes):
        return False
    needed = (need for need in needs(config, base, size, expected, nodes) if need.advice is None)
    return all(missing(config.cluster.fewest, need, nodes) is None for need in needed)


def unknown(nodes: Sequence[Node]) -> bool:
    """True if the memory of a GPU is not known: then the smallest plan is taken, and nothing is refused."""
    return any(node.info.gpu_memory is None for node in nodes)


def smaller(
    config: DecidedConfig, base: BaseModel, expected: Expected, nodes: Sequence[Node]
) -> str:
    """Return advice: the first of `changes` with which the workers fit."""
    for change in changes(config, expected):
        other = override(config, change)
        then = replace(expected, dtype=change.get("model.dtype", expected.dtype))
        if fits(other, base, estimate(other, base, then), then, nodes):
            settings = [f"{field}={str(value).lower()}" for field, value in change.items()]
            return f"it fits with {', '.join(settings)}"
    return (
        "use nodes with more memory or a smaller model: none of train.activation_checkpointing, a smaller"
        " train.micro_batch or data.max_length, cluster.strategy=fsdp and model.dtype=bfloat16 is enough"
    )


def changes(config: DecidedConfig, expected: Expected) -> Iterator[dict[str, Any]]:
    """Yield settings that need less memory, the least costly first. Each adds to the previous ones.

    Fewer answers at a time come alone at first, and at the end together with all others. The number of workers stays:
    the message says how many fit.
    """
    yield from _fewer_answers(config)
    change: dict[str, Any] = {}
    if not config.train.activation_checkpointing:
        yield {"train.activation_checkpointing": "swiglu"}
    if config.train.activation_checkpointing is not True:
        change["train.activation_checkpointing"] = True
        yield dict(change)
    micro = config.train.micro_batch
    while micro > 1:
        micro //= 2
        change["train.micro_batch"] = micro
        yield dict(change)
    cluster = config.cluster
    unsharded = cluster.strategy == "ddp" and cluster.fewest > 1
    if unsharded and config.model.quantization == "none":
        change["cluster.strategy"] = "fsdp"
        # It had no effect with ddp, and may not divide the number of workers.
        if cluster.fsdp_replicas > 1:
            change["cluster.fsdp_replicas"] = 1
        yield dict(change)
    asked = config.model.dtype == "float32"
    if asked or (expected.gpu and expected.dtype == "float32"):
        change["model.dtype"] = "bfloat16"
        yield dict(change)
    length = config.data.max_length
    # Sequences of less than 256 tokens would cut most examples, so they are no advice.
    while length >= 512:
        length //= 2
        change["data.max_length"] = length
        yield dict(change)
    yield from (change | fewer for fewer in _fewer_answers(config))


def _fewer_answers(config: DecidedConfig) -> Iterator[dict[str, Any]]:
    # Prompts are answered in batches, so only a number of prompts below the size of a batch needs less memory.
    count = answers_at_once(config)
    while count > 1:
        count //= 2
        change = {"evaluation.samples": min(config.evaluation.samples, count)}
        if config.evaluation.scorer:
            change["evaluation.rows"] = min(config.evaluation.rows, count)
        yield change


def needs(
    config: DecidedConfig,
    base: BaseModel,
    size: MemoryEstimate,
    expected: Expected,
    nodes: Sequence[Node] = (),
) -> Iterator[Need]:
    running = size.total_bytes() + PROCESS_BYTES
    gpus = config.cluster.gpus_per_worker
    wanted = getattr(torch, expected.dtype)
    stored = stored_as(base, wanted)
    converted = 0
    if stored != NAMES[wanted] and not size.by_rows:
        converted = size.parameters * wanted.itemsize
    if not expected.gpu:
        running = max(running, PROCESS_BYTES + converted)
        yield Need("memory", running, lambda node: node.info.memory, None)
        return
    running += PEER_BYTES * _peers(config.cluster.fewest, nodes)
    yield Need("GPU memory", running, lambda node: _gpu_memory(node) * gpus, None, each=True)
    advice = "use fewer workers per node: raise cluster.cpus_per_worker"
    if converted:
        advice += (
            f", or use a base model stored in {NAMES[wanted]} ({stored} is converted in memory)"
        )
    held = PROCESS_BYTES + converted + COPIES * 4 * size.trainable
    yield Need("CPU memory", held, lambda node: node.info.memory, advice)


def _peers(workers: int, nodes: Sequence[Node]) -> int:
    """Return the number of workers with which a worker exchanges data (train/tree.py)."""
    sizes = {node.fits for node in nodes}
    each = min(sizes, default=workers)
    if len(sizes) > 1 or workers % each:
        return workers - 1
    return each - 1 + workers // each - 1


def missing(fewest: int, need: Need, nodes: Sequence[Node]) -> str | None:
    room = sum(need.room(node) for node in nodes)
    if room >= fewest:
        return None
    each = " per worker" if need.each else ""
    shown = ", ".join(
        f"node {node.address} has {need.have(node) / GIB:.1f} GiB{each}" for node in nodes[:4]
    )
    return (
        f"cluster.workers={fewest}: each worker needs about {need.size / GIB:.1f} GiB of {need.memory}, so there is"
        f" room for {room} ({shown})"
    )


def _gpu_memory(node: Node) -> float:
    return math.inf if node.info.gpu_memory is None else node.info.gpu_memory


def stored_as(base: BaseModel, wanted: torch.dtype) -> str:
    """Return the precision in which most of the base's weights are stored, as in a header.

    If `wanted` equals it, transformers maps the files. Otherwise each worker converts the complete base in its own
    memory, unless it reads its part of a sharded base by rows, or quantises the base layer by layer.
    """
    numbers: Counter[str] = Counter()
    for file in loaded_files(Path(base.folder)):
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  # not a dict
                    part = weights.get_slice(name)
                    numbers[part.get_dtype()] += math.prod(part.get_shape())
        except (OSError, SafetensorError):
            continue  # loading the base reports the problem
    return max(numbers, key=numbers.__getitem__, default=NAMES[wanted])


Answers = list[tuple[str, NodeInfo]]


def require(
    config: AnyDecided,
    cluster: ClusterFacts,
    base: BaseModel | None = None,
    size: MemoryEstimate | None = None,
    expected: Expected | None = None,
    kept: bool = False,
) -> None:
    """Raise UserError with all problems that prevent the run on this cluster. Needs ray.init.

    It is no problem, but logged, if the run must wait for nodes that the autoscaler may start, or if it has a range of
    workers. Memory and disk are checked for a training, which has a base, a size and what the plan expects.
    """
    problems = [*_workers(config), *cluster.problems]
    if base is not None and size is not None and expected is not None:
        assert isinstance(config, DecidedConfig)
        nodes = cluster.with_room(config.cluster.fewest)
        problems += memory_problems(config, base, size, expected, nodes, kept)
        problems += disk_problems(config, size, base)
    if problems:
        raise of_problems("the run cannot start here", problems)


def _workers(config: AnyDecided) -> Iterator[str]:
    """Yield the problem if the fewest workers have no room, now or later. Log if they wait."""
    nodes = resources.present()
    wanted = resources.worker_resources(config)
    fewest = config.cluster.fewest
    now, most = resources.rooms(wanted)
    fields = ", ".join(f"{name.lower()}s_per_worker={each:g}" for name, each in wanted.items())
    have = ", ".join(f"{resources.amount(name, nodes):g} {name}s" for name in wanted)
    have += f", {plural(len(nodes), 'node')}"
    needs = (
        f"cluster.workers={fewest} with {fields}: the cluster has room for {now} of them ({have})"
    )
    if now >= fewest:
        free = resources.free_workers(wanted)
        if free < fewest:
            logger.info(
                f"training waits until others release their room: {needs}, {free} of them now"
            )
        return
    if fewest <= most or config.cluster.is_elastic:
        logger.info(f"training waits for the cluster to grow: {needs}")
        return
    if most > now:
        needs += f" and can grow to {most}"
    yield f"{needs}; use fewer workers, or cluster.workers=[MIN, MAX] to wait until the cluster grows"


def _answers(config: AnyConfig, nodes: Sequence[dict[str, Any]]) -> tuple[Answers, list[str]]:
    # A single node is this one, and RunFolder.check has already written into its local storage.
    if len(nodes) == 1 and not storage.is_uri(config.run.storage):
        info = node_facts.node_info(plugins_in(config))
        return [_with_others(nodes[0], info)], []
    try:
        every = node_facts.query_nodes(nodes, config.run.storage, plugins_in(config))
    except (OSError, ValueError) as error:
        return [], [f"run.storage: {config.run.storage} cannot be written: {error}"]
    named = list(zip(nodes, every, strict=True))
    answers = [_with_others(node, answer) for node, answer in named if isinstance(answer, NodeInfo)]
    silent = [
        (node["NodeManagerAddress"], answer) for node, answer in named if isinstance(answer, str)
    ]
    return answers, _grouped(silent)


def _with_others(node: Mapping[str, Any], info: NodeInfo) -> tuple[str, NodeInfo]:
    # The free memory of the GPUs counts where processes use them that Ray does not know.
    address = node["NodeManagerAddress"]
    total = info.gpu_memory
    free = info.gpu_free
    free_for_ray = ray_internals.free_resources().get(node["NodeID"], {}).get("GPU", 0.0)
    # Ray gives this run other GPUs than those in use.
    busy = free_for_ray < node["Resources"].get("GPU", 0.0)
    if busy or total is None or free is None or total - free < GIB:
        return address, info
    logger.warning(
        f"node {address}: other processes ({', '.join(map(str, info.gpu_processes[:4])) or 'of other containers'})"
        f" leave {free / GIB:.1f} of {total / GIB:.1f} GiB on a GPU: stop them, or start Ray there with"
        " CUDA_VISIBLE_DEVICES set to the free GPUs"
    )
    return address, replace(info, gpu_memory=free)


def plugins_in(config: AnyConfig) -> list[tuple[Table, str]]:
    """Return the members of tables that this config takes from installed packages."""
    sources = [*config.data.train, *config.data.eval]
    used = list[tuple[Table, str]]()
    if isinstance(config, Config):
        if isinstance(config.gate.guard, tuple):
            sources += [each for each in config.gate.guard if isinstance(each, Source)]
        used.append((METHODS, config.adapter.method))
        if not is_auto(config.train.objective):
            used.append((OBJECTIVES, config.train.objective))
        used.append((OPTIMIZERS, config.train.optimizer))
        used += [(EXPORTERS, name) for name in config.export.also]
    used += [(FORMATS, source.format) for source in sources if not is_auto(source.format)]
    return [(table, name) for table, name in dict.fromkeys(used) if name not in table.own]


def version_problems(here: NodeInfo, answers: Answers, library: str | None = None) -> list[str]:
    """Return the packages that have another version on a node than here.

    Python's last number and a build's tag (+cpu) may differ. `library` is the optional package that this run needs.
    """
    problems = []
    for address, info in answers:
        for package, wanted in here.versions.items():
            if package in node_facts.FOR_SOME and package != library:
                continue
            version = info.versions.get(package)
            if _public(package, version) == _public(package, wanted):
                continue
            shown = f"{package} {version}" if version else f"no {package}"
            advice = "install the same version on all nodes"
            problems.append((address, f"has {shown}, here it is {wanted}: {advice}"))
    return _grouped(problems)


def code_problems() -> list[str]:
    # Ray's workers import from the current folder first, and the driver does not. So a script that is started in a
    # newer checkout would mix the installed code with the checkout's code.
    other = Path.cwd() / node_cache.PACKAGE.name
    if not (other / "__init__.py").is_file() or node_cache.project(other) == node_cache.project():
        return []
    return [
        f"{other} differs from {node_cache.PACKAGE}, which this process uses: workers would import the copy in the"
        " current folder; install that copy (pip install --no-deps .), or start from another folder"
    ]


def _public(package: str, version: str | None) -> str | None:
    if version is not None and package == "python":
        return ".".join(version.split(".")[:2])
    return version and version.partition("+")[0]


def gpu_problems(wanted: Resources, answers: Answers) -> list[str]:
    if "GPU" not in wanted:
        return []
    of_node = {
        node["NodeManagerAddress"]: node["Resources"] for node in resources.schedulable_nodes()
    }
    problems = []
    for address, info in answers:
        if of_node.get(address, {}).get("GPU"):
            problem = unusable_gpu(info)
            if problem is not None:
                problems.append((address, problem))
    return _grouped(problems)


def unusable_gpu(info: NodeInfo) -> str | None:
    torch = info.versions["torch"] or ""
    instead = "or set cluster.gpus_per_worker=0"
    if torch.endswith("+cpu"):
        return f"has GPUs, and torch {torch}, which is for CPUs only: install torch for CUDA there, {instead}"
    if info.gpu_generation is None and info.gpu_memory is None and "+rocm" not in torch:
        return f"has GPUs that NVIDIA's driver does not show: fix the driver, {instead}"
    if info.driver_cuda and info.torch_cuda and info.driver_cuda < info.torch_cuda:
        return (
            f"has an NVIDIA driver for CUDA {info.driver_cuda}, and torch {torch}, which is for CUDA {info.torch_cuda}:"
            " update the driver there (CUDA 13 needs 580 or newer), install another build of torch (for CUDA 12: cu126,"
            f" cu128), {instead}"
        )
    return None


def disk_problems(config: DecidedConfig, size: MemoryEstimate, base: BaseModel) -> Iterator[str]:
    """Yield the problem if the disk is too small for the tokens, checkpoints and exports that do not exist yet.

    A local storage needs room for all of them. Any other storage needs room in the temporary folder, from which the
    files are uploaded.
    """
    checkpoint = 5 * 4 * size.trainable  # factors, update, two moments, the best update
    exports = 2 * 4 * size.trainable + sum(
        file.stat().st_size for file in Path(base.folder).glob("*.safetensors")
    )
    if storage.is_uri(config.run.storage):
        temporary = tempfile.gettempdir()
        need = checkpoint + exports
        free = shutil.disk_usage(temporary).free
        if free < need:
            yield (
                f"run.storage: uploads need about {need / GIB:.2f} GiB in {temporary}, where {free / GIB:.2f} GiB are"
                " free; make room, or set TMPDIR to another folder"
            )
        return
    root = Path(config.run.storage)
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    # Only sources that are single local files. Others are opened only when they are read.
    sources = [Path(source.path) for source in (*config.data.train, *config.data.eval)]
    parts = {
        # About as much as the text.
        "tokens": sum(path.stat().st_size for path in sources if path.is_file()),
        "checkpoints": (config.train.keep + 1) * checkpoint,
        "exports": exports,
    }
    # Existing tokens may belong to other runs. They must not count as this run's checkpoints, or the reverse.
    tokens = max(0, parts["tokens"] - _used(root / "tokens"))
    need = tokens + max(0, parts["checkpoints"] + parts["exports"] - _used(root / config.run.name))
    free = shutil.disk_usage(existing).free
    if free < need:
        shown = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
        yield (
            f"run.storage: the run needs about {need / GIB:.2f} GiB below {root} ({shown}), where {free / GIB:.2f} GiB"
            " are free; make room, or set another run.storage"
        )


def _used(folder: Path) -> int:
    used = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                used += os.path.getsize(os.path.join(root, name))
    return used


def _grouped(problems: Sequence[tuple[str, str]]) -> list[str]:
    """Return `nodes A, B, C and 3 more: problem` for each problem of (address, problem)."""
    nodes: dict[str, list[str]] = {}
    for address, problem in problems:
        nodes.setdefault(problem, []).append(address)
    lines = []
    for problem, addresses in nodes.items():
        word = "node" if len(addresses) == 1 else "nodes"
        lines.append(f"{word} {some(addresses)}: {problem}")
    return lines
