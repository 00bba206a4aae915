"""Context of one training process: rank, world size, device and the base model it may use."""

import contextlib
import logging
import math
import os
import platform
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import ray
import torch

from olora_ray.adapter.inject import install, remove
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.cluster import ray_internals
from olora_ray.cluster.malloc import keep_freed_memory
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model import attention
from olora_ray.model.load import pick_dtype
from olora_ray.model.source import BaseModel, on_this_node
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import load_base, together

logger = logging.getLogger(__name__)

# Device of a Ray process: the GPU that it was given, else the CPU.


VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Variables that hold the GPUs which a process sees, NVIDIA's and AMD's; torch counts these, from 0."""


def assigned_device() -> torch.device:
    """Where this task or actor computes; the CPU in a driver and in a process without Ray.

    A worker of Ray Train asks `ray.train.torch.get_device` instead: it sees the GPUs of all workers on its node.
    Raises UserError if torch cannot use the GPU that this process was given.
    """
    given = [str(each) for each in ray.get_gpu_ids()] if ray.is_initialized() else []
    device = device_of(given, os.environ)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"cluster.gpus_per_worker: this process was given GPU {given[0]} of its node, which torch"
            f" {torch.__version__} cannot use; install torch for CUDA there, or set it to 0"
        )
    multiply_exactly(device)
    return device


def multiply_exactly(device: torch.device) -> None:
    """Have this process multiply float32 as float32 on its GPU, whatever its environment says.

    NVIDIA's images for torch set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1: products of float32 have three digits then, with
    which a merged weight is not base + change within one rounding, as its check has it.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")


def device_of(given: Sequence[str], environment: Mapping[str, str]) -> torch.device:
    """The device of a process with this environment, which was given these GPUs of its node."""
    if not given:
        return torch.device("cpu")
    seen = next((environment[name].split(",") for name in VISIBLE if environment.get(name)), None)
    if seen is None:  # all of the node's: Ray was told not to hide them
        return torch.device("cuda", int(given[0]))
    return torch.device("cuda", seen.index(given[0]) if given[0] in seen else 0)


Adapted = Mapping[str, AdaptedWeight]


class RayTrainContext:
    """A worker of Ray Train; the base model is its own."""

    def __init__(self, config: Config) -> None:
        import ray.train
        import ray.train.torch

        self.device: torch.device = ray.train.torch.get_device()
        self._loss: SupervisedLoss | None = None
        self._installed = False
        use_cpus(config, self.device)
        multiply_exactly(self.device)

    @property
    def rank(self) -> int:
        """The rank of this worker in its current group."""
        return collectives.rank()

    @property
    def world(self) -> int:
        """The number of workers in that group."""
        return collectives.world_size()

    def preemption_announced(self) -> bool:
        """True once Ray has announced a preemption. A local read: may be called every step."""
        return ray_internals.preemption_noted()

    def preempted_nodes(self) -> tuple[str, ...]:
        """Return the ids of the preempted nodes. A barrier: all workers of a trainer of Ray must call it together."""
        import ray.train

        info = ray.train.get_preemption_info()
        return tuple(info.preempted_node_ids) if info else ()

    def base(self, spec: TrainSpec) -> SupervisedLoss:
        """The base model; to be used inside `activate` only."""
        if self._loss is None:
            self._loss = load(spec, self.device)
        self._loss.recompute = spec.recompute
        return self._loss

    @contextlib.contextmanager
    def activate(self, adapted: Adapted) -> Iterator[None]:
        """The base model with these adapters, or untouched with none.

        Adapters stay where they are put: a sharded base cannot be taken apart.
        """
        if adapted and not self._installed:
            assert self._loss is not None
            install(self._loss.model, adapted)
            self._installed = True
        yield


class SharedBase:
    """A base model that several adapters are trained on, one step of each in turn."""

    def __init__(self, loss: SupervisedLoss, device: torch.device, dtype: str | None = None) -> None:
        self.loss, self.device, self.dtype = loss.to(device), device, dtype
        self.turns = Turns()

    @classmethod
    def of(cls, spec: TrainSpec, device: torch.device) -> "SharedBase":
        """The base model of a spec, in this process."""
        use_cpus(spec.config, device)
        config = agreed(spec.config, device)
        return cls(load(replace(spec, config=config), device), device, config.model.dtype)


def on_cpu(spec: TrainSpec) -> TrainSpec:
    """The spec for a process that measures in the memory of a node what is trained on GPUs, as a sharded base is.

    An attention that needs a GPU is left to choose there.
    """
    if spec.config.model.attention not in (attention.FLASH, attention.VARLEN):
        return spec
    return replace(spec, config=override(spec.config, {"model.attention": "auto"}))


class SharedBaseContext:
    """The context of one adapter on a shared base; its training runs in a thread of its own."""

    def __init__(self, shared: SharedBase) -> None:
        self.rank, self.world = 0, 1
        self.device, self.dtype = shared.device, shared.dtype
        self._shared = shared

    def base(self, spec: TrainSpec) -> SupervisedLoss:
        """The base model, which is there already, in the precision that it has."""
        self._shared.loss.recompute = spec.recompute
        return self._shared.loss

    @contextlib.contextmanager
    def activate(self, adapted: Adapted) -> Iterator[None]:
        """The base model with these adapters, when it is this context's turn."""
        with self._shared.turns:
            model = self._shared.loss.model
            install(model, adapted)
            try:
                yield
            finally:
                remove(model)

    def preemption_announced(self) -> bool:
        """False: a process outside Ray Train learns of a preemption when it dies."""
        return False

    def preempted_nodes(self) -> tuple[str, ...]:
        """None."""
        return ()


WorkerContext = RayTrainContext | SharedBaseContext
"""What a Worker knows of its process: device, rank, number of workers, base model, preemption."""


class Turns:
    """A fair lock: it goes to whoever has waited longest, where threading.Lock may let one thread return at once."""

    def __init__(self) -> None:
        self._guard, self._waiting = threading.Lock(), deque[threading.Event]()

    def __enter__(self) -> None:
        ticket = threading.Event()
        with self._guard:
            if not self._waiting:
                ticket.set()
            self._waiting.append(ticket)
        ticket.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            self._waiting.popleft()
            if self._waiting:
                self._waiting[0].set()


def load(spec: TrainSpec, device: torch.device) -> SupervisedLoss:
    """The base model of a spec, frozen; of a sharded one this worker's part. All workers must call it together.

    Raises the UserError that one of them meets, whose node does not see the model, say, on all.
    """
    base = together(lambda: _brought(spec, device))
    return load_base(base.folder, agreed(spec.config, device), device)


def _brought(spec: TrainSpec, device: torch.device) -> BaseModel:
    """The base on this node; on GPUs returns when all workers have theirs, or an error.

    From a hub a large model may take longer than an exchange waits, on nodes that do not have it yet. On CPUs workers
    may be lost one by one, which only an exchange notices.
    """
    try:
        return on_this_node(spec.base, spec.config)
    finally:
        if device.type == "cuda":
            collectives.wait_for_all()


def agreed(config: Config, device: torch.device, began: str | None = None) -> Config:
    """The config with one precision for all workers in place of `auto`: `began`, if the run began in that.

    It is float32 where `auto` means another one for one worker than for another. Else a micro-batch would have
    another loss here than there, and shards of a base another size.
    """
    if config.model.dtype != "auto":
        return config
    found = [str(dtype).removeprefix("torch.") for dtype in collectives.gather(pick_dtype(config.model, device))]
    dtype = began or (found[0] if len(set(found)) == 1 else "float32")
    if began and (other := set(found) - {began}):
        logger.warning(
            f"model.dtype: auto: {began}, in which this run began, though {min(other)} is what its workers of now"
            " would begin with; it is the one way to the same result"
        )
    elif not began and len(set(found)) > 1:
        logger.warning(
            f"model.dtype: auto: float32: {found.count('float32')} of {len(found)} workers are not fast at"
            f" {max(set(found) - {'float32'})}; use workers of one kind, or set it"
        )
    return override(config, {"model.dtype": dtype})


def use_cpus(config: Config, device: torch.device) -> None:
    """As many threads as the process has CPUs of Ray's, at least one."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, math.floor(config.cluster.cpus_per_worker)))
        # What of a sharded base is gathered is large, and comes and goes: kept, it would leave holes that nothing else
        # fits in (a third more memory was measured), and who shards has no memory to spare.
        if config.cluster.strategy != "fsdp":
            keep_freed_memory()


# The platform of the workers: on what, beside its config and data, the bytes of a training depend. Their number is not
# part of it (train/tree.py).


Kind = dict[str, str]
"""Device, processor, threads and torch of a worker."""


def kind_of(device: torch.device) -> Kind:
    """Return the kind of this process, which computes on `device`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def note_kinds(before: Sequence[Kind], device: torch.device) -> list[Kind]:
    """Return the different kinds of all workers; warn of several, or of others than `before`, of a checkpoint.

    All workers must call it together.
    """
    every = collectives.gather(kind_of(device))
    now = [each for place, each in enumerate(every) if each not in every[:place]]
    if line := said(before, now):
        logger.warning(line)
    return now


def said(before: Sequence[Kind], now: Sequence[Kind]) -> str | None:
    """Return the warning for workers of these kinds after those of others; None if there is nothing to say."""
    if len(now) > 1:
        return (
            f"workers of {plural(len(now), 'kind')} ({_apart(now)}): "
            " the result may differ in its last bits with which of them computes what"
        )
    if before and list(before) != list(now):
        old = [each for each in before if each not in now]
        return (
            f"other workers than those of the checkpoint ({_apart([*old, *now])}): from here on the result"
            " may differ in its last bits from that of a run that went on as it began"
        )
    return None


def _apart(kinds: Sequence[Kind]) -> str:
    """In what they differ: `threads: 1, 2`."""
    fields = {what: list(dict.fromkeys(each.get(what, "?") for each in kinds)) for what in kinds[-1]}
    return "; ".join(f"{what}: {', '.join(values)}" for what, values in fields.items() if len(values) > 1)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
