"""Checks before expensive work: whether the cluster has, or can get, what a run needs; all problems in one error."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from olora_ray.cluster import memory_room, node_facts, resources
from olora_ray.cluster.node_facts import NodeInfo
from olora_ray.cluster.resources import Resources
from olora_ray.common import kept, storage
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.evaluation import AnyConfig
from olora_ray.config.schema import Config
from olora_ray.model.quantised import KINDS
from olora_ray.model.source import BaseModel
from olora_ray.train.estimate import MemoryEstimate, estimate
from olora_ray.train.parallel import strategy_problem

logger = logging.getLogger(__name__)

Answers = list[tuple[str, NodeInfo]]
"""Address of a node, and what it says."""
GIB = 2**30


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
    problems += _versions(node_facts.node_info(), answers, None if kind is None else kind.library)
    problems += _code()
    problems += _gpus(wanted, answers)
    problems += _strategy(config)
    problems += _spares(config, wanted)
    problems += _storage(config, answers)
    if base is not None and isinstance(config, Config):
        loaded = memory_room.as_loaded(config, wanted, answers)
        size = _size(loaded, base, wanted, answers)
        problems += memory_room.problems(loaded, base, size, wanted, answers)
        problems += _disk(config, size, base)
    if problems:
        raise UserError("; ".join(problems))


def recomputes(config: Config, base: BaseModel) -> bool:
    """Whether blocks are run again in the backward pass, on this cluster; needs ray.init."""
    if config.train.activation_checkpointing != "auto":
        return config.train.activation_checkpointing
    wanted = resources.worker_resources(config)
    answers, _ = _ask(config, resources.schedulable_nodes())
    loaded = memory_room.as_loaded(config, wanted, answers)
    size = estimate(loaded, base, gpu="GPU" in wanted)
    return memory_room.with_recomputation(loaded, base, size, wanted, answers).recompute


def _size(config: Config, base: BaseModel, wanted: Resources, answers: Answers) -> MemoryEstimate:
    """What a worker needs; a line says what is not as people have been told."""
    planned = estimate(config, base, gpu="GPU" in wanted)
    size = memory_room.with_recomputation(config, base, planned, wanted, answers)
    if size.problem:
        logger.info(f"memory: activations by a formula, rather too much: the model's code cannot tell ({size.problem})")
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


def _versions(here: NodeInfo, answers: Answers, library: str | None = None) -> list[str]:
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


def _code() -> list[str]:
    """Another copy of the project in the folder of now: Ray's workers look there first, and the driver does not.

    A checkout, say, from which a script is started that imports what was installed of an earlier one.
    """
    other = Path.cwd() / kept.PACKAGE.name
    if not (other / "__init__.py").is_file() or kept.project(other) == kept.project():
        return []
    return [
        f"{other} has other code than {kept.PACKAGE}, which this is, and the workers would take it: install it (pip"
        " install --no-deps .), or start from another folder"
    ]


def _public(package: str, version: str | None) -> str | None:
    if version is not None and package == "python":
        return ".".join(version.split(".")[:2])
    return version and version.partition("+")[0]


def _strategy(config: AnyConfig) -> list[str]:
    problem = isinstance(config, Config) and strategy_problem(config.cluster.strategy)
    return [problem] if problem else []


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


def _gpus(wanted: Resources, answers: Answers) -> list[str]:
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


def _disk(config: Config, size: MemoryEstimate, base: BaseModel) -> Iterator[str]:
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
