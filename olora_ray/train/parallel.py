"""Placement of a model on the workers: ddp or fsdp.

ddp: every worker holds the whole base. fsdp: FSDP2 shards the blocks of the frozen base; `load_base` loads
them so that nobody ever holds the whole. What is in no block, embeddings and head above all, is whole on every worker:
each needs it in every step, and gathering it would take room for it twice. In both the adapters are whole on every
worker (they are small) and their gradients are summed once a step in one fixed tree (train/tree.py), so accumulation
needs no `no_sync`, a step has the same bits whatever the number of workers, and a checkpoint is the same file for both.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from olora_ray.adapter.candidates import GATE, ROUTER, candidates
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.common import collectives, node_cache, storage
from olora_ray.common.errors import UserError, short_reason
from olora_ray.config.schema import Config
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.model.folder import of_folder
from olora_ray.model.load import empty_model, load_model
from olora_ray.model.quantised import KINDS, Packed, QuantisedLinear, pack, require
from olora_ray.train import base_files
from olora_ray.train.base_files import BaseFiles, blocks_to_shard, decoder_layers
from olora_ray.train.loss import SupervisedLoss

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Recomputation of activations: of each block the input alone is kept, and the backward pass runs the block again.


def install(loss: SupervisedLoss) -> None:
    """Let the blocks of the model be run again, if `loss.recompute` says so; may be called again.

    From then on `loss.recompute` is a switch. Works inside FSDP2 too: a block is gathered before its backward pass.
    """
    if not loss.recompute:
        return
    for block in decoder_layers(loss.model):
        if not isinstance(block.forward, _Recomputed):
            block.__dict__["forward"] = _Recomputed(block.forward, loss)


class _Recomputed:
    """The forward of a block, which keeps its inputs alone where a gradient is wanted."""

    def __init__(self, forward: Callable[..., Any], loss: SupervisedLoss) -> None:
        self.__wrapped__ = forward  # whoever asks for its signature gets that
        self._loss = loss

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the block's output."""
        if not (self._loss.recompute and torch.is_grad_enabled()) or _has_cache((*inputs, *named.values())):
            return self.__wrapped__(*inputs, **named)
        # Named inputs too are handed over as inputs: on the devices of these the random numbers are kept.
        return checkpoint(self._run, inputs, named, use_reentrant=False, preserve_rng_state=True)

    def _run(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
        return self.__wrapped__(*inputs, **named)


def _has_cache(values: Sequence[Any]) -> bool:
    """True if keys and values are kept for later tokens: a second run would add them again."""
    from transformers import Cache

    return any(isinstance(value, Cache) for value in values)


@contextmanager
def switched(loss: SupervisedLoss, on: bool) -> Iterator[None]:
    """Turn recomputation on or off for the block; on has an effect only after `install`."""
    before, loss.recompute = loss.recompute, on
    try:
        yield
    finally:
        loss.recompute = before


def check_same(family: str, with_it: Sequence[Tensor], without: Sequence[Tensor]) -> None:
    """Raise UserError unless the gradients with recomputation are those without it: the same bits on CPUs.

    A block that changes its inputs, or something outside, would do it twice.
    """
    if all(torch.equal(one, other) for one, other in zip(with_it, without, strict=True)):
        return
    off, norm = (
        float(torch.stack([part.float().norm() for part in parts]).norm())
        for parts in ([one - other for one, other in zip(with_it, without, strict=True)], without)
    )
    # Kernels of other devices do not add in a fixed order.
    if without[0].device.type == "cpu" or not off <= 1e-3 * norm:
        raise UserError(
            f"train.activation_checkpointing: the gradients of {family} differ by {off / norm:.2g} when its blocks are"
            " run again; set it to false, and lower train.micro_batch or data.max_length if memory is short"
        )


def place_model(
    loss: SupervisedLoss, strategy: str, device: torch.device, replicas: int = 1, offload: bool = False
) -> None:
    """Move the model to `device`, and shard the frozen base over the workers for "fsdp", `replicas` and `offload` as of
    `shard`.

    May be called again with adapters in place: a base that is sharded stays so.
    """
    install(loss)
    if strategy == "fsdp" and collectives.world_size() > 1 and not hasattr(loss, "unshard"):
        shard(loss, device, replicas, offload)
    # Sharding moves the base; adapters and buffers are ignored by it.
    root: Any = loss  # torch leaves `_apply` untyped
    place = places(loss, device)
    root._apply(lambda part: part.to(place(part)))


def places(loss: Any, device: torch.device) -> Callable[[Tensor], torch.device]:
    """Return a function from a parameter or buffer to its place: `device`, or the CPU for shards of offloaded blocks.

    Module.to would move these too, and FSDP then refuses to run.
    """
    from torch.distributed.tensor import DTensor

    for block in loss.offloaded:
        block.reshard()
    stay = {id(part) for block in loss.offloaded for part in block.parameters() if isinstance(part, DTensor)}
    return lambda part: torch.device("cpu") if id(part) in stay else device


def shard(loss: SupervisedLoss, device: torch.device, replicas: int = 1, offload: bool = False) -> None:
    """Shard the blocks of the frozen base; adapters and what is in no block stay whole. Weights may still be meta.

    Each of the copies is spread over workers of consecutive ranks, which Ray gives to the workers of a node.
    `offload`: shards stay in the memory of the node, and are copied to the device each time they are gathered.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    world = collectives.world_size()
    shape, names = ((world,), ("shards",)) if replicas == 1 else ((replicas, world // replicas), ("copies", "shards"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    adapters = {
        parameter
        for module in loss.modules()
        if isinstance(module, AdaptedWeight)
        for parameter in (module.da, module.db)
    }
    apart = offload and has_own_memory(device)
    # Pinned memory is copied to a GPU while it computes.
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if apart else OffloadPolicy()
    blocks = blocks_to_shard(loss.model)
    whole = adapters | outside(loss, blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=adapters, offload_policy=policy)
        loss.offloaded += [block] if apart else []
    fully_shard(loss, mesh=mesh, ignored_params=whole)


def outside(model: nn.Module, blocks: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The parameters that are in none of the blocks."""
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return {parameter for parameter in model.parameters() if id(parameter) not in inside}


def has_own_memory(device: torch.device) -> bool:
    """True if tensors of the device lie elsewhere than in the memory of the node."""
    return device.type != "cpu"


def own_rows(parameter: "DTensor") -> tuple[int, int]:
    """The rows first..last of a sharded parameter that this worker has; none where there are fewer rows than workers.

    As torch.chunk cuts them: all parts but the last have the same size.
    """
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    size = math.ceil(rows / mesh.size(-1))
    first = min(size * mesh.get_local_rank(mesh.ndim - 1), rows)
    return first, min(first + size, rows)


def begin_at_root(loss: Any) -> None:
    """Before a part of a sharded base is asked alone: FSDP takes the module that runs first for the root of the whole.

    Then the first loss would fail: an empty method of the root runs first.
    """
    if not hasattr(loss, "unshard"):
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    loss.nothing = lambda: None
    register_fsdp_forward_method(loss, "nothing")
    loss.nothing()
    del loss.nothing


# The frozen base as a training computes with it: as its files have it, or with packed linear layers.


def load_frozen(folder: str | Path, config: ModelConfig, device: torch.device) -> "PreTrainedModel":
    """Load a model as `load_model` does, with `model.quantization`; packed layers are on `device` already.

    Raises UserError as `load_model` and `to_pack`.
    """
    if config.quantization == "none":
        return load_model(folder, config, device)
    began = time.perf_counter()
    require(config.quantization)
    model: Any = empty_model(folder, config, device)
    names = to_pack(model)
    found = base_files.find(Path(folder), model)
    problem = found if isinstance(found, str) else found.differs(0, 1)
    if problem is None:
        assert isinstance(found, BaseFiles)
        place = _packed(Path(folder), found, names, config.quantization)
        for number, name in enumerate(names):
            if place is None:
                _pack(model, name, found.whole(f"{name}.weight"), config.quantization, device)
            else:
                part = load_file(place / str(number))
                weight = model.get_submodule(name).weight
                _pack(model, name, weight, config.quantization, device, (part["codes"], part["scales"]))
        base_files.fill(model, found, lambda _: True)
    else:
        logger.info(f"quantization: the whole base is loaded before it is packed: {problem}")
        model = load_model(folder, config, device)
        names = to_pack(model)  # of one that is quantised already there is none
        for name in names:
            _pack(model, name, model.get_submodule(name).weight, config.quantization, device)
    taken = time.perf_counter() - began
    logger.info(
        f"quantization: {len(names)} linear layers are kept as {config.quantization}, packed or read in {taken:.2f} s"
    )
    frozen: PreTrainedModel = model
    return frozen


def _packed(folder: Path, found: BaseFiles, names: Sequence[str], kind: str) -> Path | None:
    """Return the folder of this node with codes and scales of these layers, by their numbers; None if none is written.

    Packing takes minutes: one process of a node does it, once for all runs.
    """
    dtypes = sorted({str(found.dtypes[f"{name}.weight"]) for name in names})
    key = storage.digest(of_folder(folder, code=False), kind, *dtypes, *names, node_cache.code(), length=32)
    root = Path(node_cache.CACHE) / "packed"

    def make(partial: Path) -> None:
        partial.mkdir(exist_ok=True)
        for number, name in enumerate(names):
            codes, scales = pack(found.whole(f"{name}.weight"), kind)
            save_file({"codes": codes, "scales": scales}, partial / str(number))

    try:
        entry = node_cache.cached(root / key, make)
        node_cache.hold(entry)
        node_cache.make_room(root, (each for each in root.iterdir() if not each.name.startswith(".")))
    except (OSError, SafetensorError) as error:
        logger.info(f"quantization: the packed base is not kept on this node: {short_reason(error)}")
        return None
    return entry


def to_pack(model: nn.Module) -> list[str]:
    """The layers that are packed, in the model's order; raises UserError if there is none."""
    inside = {id(part) for block in decoder_layers(model) for part in block.modules()}
    shared = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    found = []
    for name, item in candidates(model).items():
        module: Any = item.target.module
        plain = type(module) is nn.Linear and item.refused is None and item.aside not in (ROUTER, GATE)
        even = plain and module.weight.numel() % 2 == 0  # two numbers share a byte
        if even and id(module) in inside and shared[id(module.weight)] == 1:
            found.append(name)
    if not found:
        raise UserError(
            f"model.quantization: {type(model).__name__} has no layers of torch's class Linear in its blocks, which"
            " alone are packed; set it to none"
        )
    return found


def packed_size(model: nn.Module, kind: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """(numbers that are packed, their bytes, bytes that the largest layer takes while it is unpacked)."""
    shapes = [tuple(model.get_parameter(f"{name}.weight").shape) for name in to_pack(model)]
    use = KINDS[kind]
    return (
        sum(m * n for m, n in shapes),
        sum(use.size(m, n) for m, n in shapes),
        max(m * n for m, n in shapes) * use.unpacking(dtype.itemsize),
    )


def _pack(
    model: nn.Module, name: str, weight: Tensor, kind: str, device: torch.device, packed: Packed | None = None
) -> None:
    """Put a packed layer in the place of one; its bias may still be without numbers."""
    parent, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(name)
    setattr(model.get_submodule(parent), attribute, QuantisedLinear(weight, module.bias, kind, device, packed))


# A base that no worker ever holds whole: built without weights, sharded, and filled from its files, rows by rows.


Value = TypeVar("Value")


def load_base(folder: str, config: Config, device: torch.device) -> SupervisedLoss:
    """The frozen base of a worker: sharded if the config says so, there are several, and its files can be read so.

    All workers must call it together. Raises UserError as `load_frozen`.
    """
    if config.cluster.strategy != "fsdp" or collectives.world_size() == 1:
        return SupervisedLoss(together(lambda: load_frozen(folder, config.model, device)))
    if config.cluster.fsdp_offload and not has_own_memory(device):
        logger.info("cluster.fsdp_offload: without a GPU the base lies in the memory of the node as it is")
    began = time.perf_counter()
    loss = _sharded(folder, config, device)
    if isinstance(loss, str):
        logger.info(f"fsdp: each worker loads the whole base before it is sharded: {loss}")
        return SupervisedLoss(together(lambda: load_frozen(folder, config.model, device)))
    logger.info(f"fsdp: each worker has read its part of the base, in {time.perf_counter() - began:.2f} s")
    return loss


def _sharded(folder: str, config: Config, device: torch.device) -> SupervisedLoss | str:
    """The base with this worker's part of it, or why its files cannot be read by rows; the same on all workers."""
    model = together(lambda: empty_model(folder, config.model, device))
    found = together(lambda: base_files.find(Path(folder), model))
    if isinstance(found := _agreed(found), str):
        return found
    whole = outside(model, blocks_to_shard(model))
    wanted = {weight for weight in model.parameters() if weight.dim() < 2 or weight in whole}
    together(lambda: base_files.fill(model, found, wanted.__contains__, partial(_whole, found, device)))
    loss: Any = SupervisedLoss(model)  # torch leaves `_apply` untyped
    loss.read_rows = found.rows
    shard(loss, device, config.cluster.fsdp_replicas, config.cluster.fsdp_offload)
    place = places(loss, device)
    # What is on the meta device becomes memory, shards of weights above all; the rest has its values.
    loss._apply(lambda part: torch.empty_like(part, device=place(part)) if part.is_meta else part.to(place(part)))
    together(lambda: _read_shards(model, found))
    sharded: SupervisedLoss = loss
    return sharded


def _agreed(found: BaseFiles | str) -> BaseFiles | str:
    """The files, if all workers have found that they can be read by rows; else the first reason why not."""
    problems = collectives.gather(found if isinstance(found, str) else None)
    if isinstance(found, BaseFiles) and not any(problems):
        differs = partial(found.differs, collectives.rank(), collectives.world_size())
        problems = collectives.gather(together(differs))
    first = next((problem for problem in problems if problem), None)
    return found if first is None else first


def together(work: Callable[[], Value]) -> Value:
    """Return the result of `work`; a UserError of one worker is raised on all, which would wait for it otherwise."""
    problem: UserError | None = None
    found = []
    try:
        found.append(work())
    except UserError as error:
        problem = error
    collectives.raise_together(problem)
    return found[0]


@torch.no_grad()
def _read_shards(model: nn.Module, files: BaseFiles) -> None:
    """Fill this worker's rows of all other weights."""
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not isinstance(parameter.data, DTensor):
            continue
        shard_of: Tensor = parameter.data.to_local()
        first, last = own_rows(parameter.data)
        assert shard_of.shape[0] == last - first
        _read_rows(files, name, first, shard_of)


def _whole(files: BaseFiles, device: torch.device, name: str) -> Tensor:
    """All of a weight, a large one on the device: the node's memory never holds more than some rows of it."""
    if len(files.shapes[name]) < 2:
        return files.whole(name)
    if device.type == "cpu" and (mapped := files.mapped(name)) is not None:
        return mapped
    found = torch.empty(files.shapes[name], dtype=files.dtypes[name], device=device)
    _read_rows(files, name, 0, found)
    return found


def _read_rows(files: BaseFiles, name: str, first: int, to: Tensor) -> None:
    """Fill a tensor with as many rows of a weight, from row `first` on, 64 MiB or one row at a time."""
    count = max(1, 2**26 * len(to) // max(to.nbytes, 1)) if files.in_parts(name) else max(1, len(to))
    for start in range(0, len(to), count):
        stop = min(start + count, len(to))
        to[start:stop].copy_(files.rows(name, first + start, first + stop))
