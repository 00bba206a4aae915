"""Context of a training process: rank, world size, device and base model."""

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

import ray
import torch

from olora_ray.adapter.inject import install, remove
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.cluster.malloc import keep_freed_memory
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.config.decided import DecidedConfig
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.config.section import is_auto
from olora_ray.model import attention
from olora_ray.model.load import pick_dtype
from olora_ray.model.source import BaseModel, on_this_node
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import load_base

logger = logging.getLogger(__name__)

# The device of a Ray process: the GPU that Ray has assigned to it, else the CPU.


VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Environment variables with the GPUs that a process sees (NVIDIA, AMD). torch numbers these GPUs from 0."""


def assigned_device() -> torch.device:
    """Return the device of this task or actor; the CPU in a driver and in a process without Ray.

    A worker of Ray Train uses `ray.train.torch.get_device` instead, because it sees the GPUs of all workers on its
    node. Raises UserError if torch cannot use the assigned GPU.
    """
    assigned = [str(gpu) for gpu in ray.get_gpu_ids()] if ray.is_initialized() else []
    device = device_of(assigned, os.environ)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"cluster.gpus_per_worker: torch {torch.__version__} cannot use GPU {assigned[0]} of this node; install"
            " torch for CUDA there, or set cluster.gpus_per_worker=0"
        )
    multiply_exactly(device)
    return device


def multiply_exactly(device: torch.device) -> None:
    """Make this process multiply float32 in full precision on its GPU, whatever its environment says.

    NVIDIA's images for torch set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1. Then products of float32 have only three digits,
    and a merged weight fails its check, which allows an error of one rounding.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")


def device_of(assigned: Sequence[str], environment: Mapping[str, str]) -> torch.device:
    if not assigned:
        return torch.device("cpu")
    visible = next(
        (environment[name].split(",") for name in VISIBLE if environment.get(name)), None
    )
    if visible is None:  # Ray is configured not to hide the other GPUs of the node
        return torch.device("cuda", int(assigned[0]))
    return torch.device("cuda", visible.index(assigned[0]) if assigned[0] in visible else 0)


Adapted = Mapping[str, AdaptedWeight]


class RayTrainContext:
    def __init__(self, config: Config) -> None:
        import ray.train
        import ray.train.torch

        self.device: torch.device = ray.train.torch.get_device()
        self._loss: SupervisedLoss | None = None
        self._installed = False
        prepare_device(config, self.device)

    @property
    def rank(self) -> int:
        return collectives.rank()

    @property
    def world(self) -> int:
        return collectives.world_size()

    def base(self, spec: TrainSpec, dtype: str) -> SupervisedLoss:
        """Return the base model, which is loaded at the first call. Use it only inside `activate`."""
        if self._loss is None:
            self._loss = load_loss(spec, self.device, dtype)
        self._loss.recompute = spec.config.train.activation_checkpointing
        return self._loss

    @contextlib.contextmanager
    def activate(self, adapted: Adapted) -> Iterator[None]:
        """Install these adapters in the base model for the block. With none, the base stays as it is."""
        # The adapters stay installed after the block, because they cannot be removed from a sharded base.
        if adapted and not self._installed:
            assert self._loss is not None
            install(self._loss.model, adapted)
            self._installed = True
        yield


class SharedBase:
    def __init__(
        self, loss: SupervisedLoss, device: torch.device, dtype: str | None = None
    ) -> None:
        self.loss = loss.to(device)
        self.device = device
        self.dtype = dtype
        self.turns = Turns()

    @classmethod
    def of(cls, spec: TrainSpec, device: torch.device) -> "SharedBase":
        prepare_device(spec.config, device)
        dtype = common_dtype(spec.config, device)
        return cls(load_loss(spec, device, dtype), device, dtype)


def on_cpu(spec: TrainSpec) -> TrainSpec:
    """Return the spec for a process that evaluates on the CPU a model that was trained on GPUs, such as a sharded base.

    model.attention becomes `auto` if its value needs a GPU.
    """
    if not attention.needs_gpu(spec.config.model.attention):
        return spec
    return replace(spec, config=override(spec.config, {"model.attention": "auto"}))


class SharedBaseContext:
    def __init__(self, shared: SharedBase) -> None:
        self.rank = 0
        self.world = 1
        self.device = shared.device
        self.dtype = shared.dtype
        self._shared = shared

    def base(self, spec: TrainSpec, dtype: str) -> SupervisedLoss:
        """Return the base model, in the precision in which it was loaded."""
        self._shared.loss.recompute = spec.config.train.activation_checkpointing
        return self._shared.loss

    @contextlib.contextmanager
    def activate(self, adapted: Adapted) -> Iterator[None]:
        """Wait for this adapter's turn, and install the adapters in the base model for the block."""
        with self._shared.turns:
            model = self._shared.loss.model
            install(model, adapted)
            try:
                yield
            finally:
                remove(model)


WorkerContext = RayTrainContext | SharedBaseContext
"""A Worker's process: device, rank, number of workers, base model."""


class Turns:
    """A fair lock: the thread that has waited longest gets it. threading.Lock may give it to the same thread again."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting = deque[threading.Event]()

    def __enter__(self) -> None:
        ticket = threading.Event()
        with self._guard:
            if not self._waiting:
                ticket.set()
            self._waiting.append(ticket)
        ticket.wait()

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._waiting.popleft()
            if self._waiting:
                self._waiting[0].set()


def load_loss(spec: TrainSpec, device: torch.device, dtype: str) -> SupervisedLoss:
    """Load the frozen base model of a spec; of a sharded base, this worker's part. All workers must call it together.

    If one worker has a UserError, for example because its node has no access to the model, all workers raise it.
    """
    base = collectives.together(lambda: _on_every_node(spec))
    return load_base(base.folder, override(spec.config, {"model.dtype": dtype}), device)


def _on_every_node(spec: TrainSpec) -> BaseModel:
    """Return the base, which is downloaded to this node if needed, when all workers have theirs."""
    # A download from a hub may take longer than the timeout of an exchange, so the workers wait without an exchange.
    try:
        return on_this_node(spec.base, spec.config)
    finally:
        collectives.wait_for_all()


def common_dtype(config: DecidedConfig, device: torch.device, began: str | None = None) -> str:
    """Return the precision of the base, the same for all workers.

    For `auto` it is `began`, the precision in which the run started, if there is one. Otherwise it is float32 if the
    workers differ in their choice. With several precisions, the loss of a micro-batch would depend on its worker, and
    the shards of a base would differ in size.
    """
    if not is_auto(config.model.dtype):
        return config.model.dtype
    own = str(pick_dtype(config.model, device)).removeprefix("torch.")
    choices = collectives.gather(own)
    others = set(choices) - {began}
    if began is not None:
        if others:
            logger.warning(
                f"model.dtype=auto: keeping {began}, in which this run started (its current workers would choose"
                f" {min(others)}), so that the result stays the same"
            )
        return began
    if len(others) == 1:
        return choices[0]
    logger.warning(
        f"model.dtype=auto: using float32, because {choices.count('float32')} of {len(choices)} workers are not"
        f" fast at {max(others - {'float32'})}; use workers with equal hardware, or set model.dtype"
    )
    return "float32"


def prepare_device(config: Config, device: torch.device) -> None:
    """Set this process's threads and memory on a CPU, and its kernels on a GPU, before the first of them runs."""
    multiply_exactly(device)
    if device.type == "cuda" and config.train.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
        # Not with warn_only: torch's attention for variable lengths would warn, and stay as it is.
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        torch.set_num_threads(max(1, math.floor(config.cluster.cpus_per_worker)))
        # With fsdp, the gathered parts of the base are large and are freed soon. Keeping that memory would fragment it:
        # a third more memory was measured, and a run that shards its base has none to spare.
        if config.cluster.strategy != "fsdp":
            keep_freed_memory()


# The platform of the workers. Beside config and data, the bytes of a training depend on it, but not on the number of
# workers (train/tree.py).


Platform = dict[str, str]
"""Device, processor, threads and torch of a worker."""


def platform_of(device: torch.device) -> Platform:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def record_platforms(before: Sequence[Platform], device: torch.device) -> list[Platform]:
    """Return the distinct platforms of all workers. Log a warning if they differ, or differ from a checkpoint's.

    `before` are the platforms in the checkpoint. All workers must call it together.
    """
    every = collectives.gather(platform_of(device))
    now = [each for number, each in enumerate(every) if each not in every[:number]]
    line = platform_warning(before, now)
    if line:
        logger.warning(line)
    return now


def platform_warning(before: Sequence[Platform], now: Sequence[Platform]) -> str | None:
    if len(now) > 1:
        return (
            f"the workers differ ({_differences(now)}): the last bits of the result may depend on which worker computes"
            " which micro-batch"
        )
    if before and list(before) != list(now):
        old = [each for each in before if each not in now]
        return (
            f"the workers differ from the checkpoint's workers ({_differences([*old, *now])}): the last bits of the"
            " result may differ from a run with equal workers"
        )
    return None


def _differences(kinds: Sequence[Platform]) -> str:
    fields = []
    for name in kinds[-1]:
        values = dict.fromkeys(each.get(name, "?") for each in kinds)
        if len(values) > 1:
            fields.append(f"{name}: {', '.join(values)}")
    return "; ".join(fields)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
