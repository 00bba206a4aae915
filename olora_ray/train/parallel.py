"""Placement of a model on the workers: ddp or fsdp.

ddp: every worker holds the whole base. fsdp: FSDP2 shards the blocks of the frozen base, and `load_base` loads them so
that no worker ever holds the whole base. Weights outside the blocks, above all embeddings and head, are whole on every
worker: every step needs them, and gathering them would take their memory twice.

In both strategies every worker has the whole adapters, which are small, and their gradients are summed once per step in
one fixed tree (train/tree.py). So accumulation needs no `no_sync`, the bits of a step do not depend on the number of
workers, and both strategies write the same checkpoint.
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

from olora_ray.adapter.candidates import plain_layers
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.common import collectives, node_cache, storage
from olora_ray.common.errors import UserError, short_reason
from olora_ray.config.schema import Config
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.model.folder import of_folder
from olora_ray.model.load import empty_model, load_model
from olora_ray.model.quantised import KINDS, Packed, QuantisedLinear, pack, require
from olora_ray.train import parts, sharded_reader
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.sharded_reader import BaseFiles, blocks_to_shard, decoder_layers

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Recomputation: only the input of each block is kept, and the backward pass runs the block again; or the backward pass
# makes two results of each MLP again.


def install(loss: SupervisedLoss) -> None:
    """Wrap the blocks, or their MLPs, if `loss.recompute` asks for it; may be called again.

    Afterwards `loss.recompute` turns recomputation on and off. It works with FSDP2, which gathers a block before its
    backward pass.
    """
    if loss.recompute == parts.SWIGLU:
        parts.light_mlps(loss, decoder_layers(loss.model))
    if loss.recompute is not True:
        return
    for block in decoder_layers(loss.model):
        if not isinstance(block.forward, _Block):
            block.__dict__["forward"] = _Block(block.forward, loss)


class _Block:
    """Forward of a block that may keep only its inputs, if a gradient is needed."""

    def __init__(self, forward: Callable[..., Any], loss: SupervisedLoss) -> None:
        self.__wrapped__ = (
            forward  # inspect.signature follows this attribute to the arguments of the block
        )
        self._loss = loss

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        from transformers import Cache

        # With a cache of keys and values a second run of the block would add the same tokens again.
        cached = any(isinstance(value, Cache) for value in (*inputs, *named.values()))
        run = self.__wrapped__
        if cached or not torch.is_grad_enabled() or self._loss.recompute is not True:
            return run(*inputs, **named)
        # `checkpoint` keeps the random state of the devices of its positional arguments, so named inputs are passed as
        # positional ones too.
        return checkpoint(_run, run, inputs, named, use_reentrant=False, preserve_rng_state=True)


def _run(run: Callable[..., Any], inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
    return run(*inputs, **named)


@contextmanager
def switched(loss: SupervisedLoss, on: bool) -> Iterator[None]:
    """Turn recomputation on or off inside a `with` block; turning it on has no effect before `install`."""
    before = loss.recompute
    loss.recompute = on
    try:
        yield
    finally:
        loss.recompute = before


def check_same(family: str, with_it: Sequence[Tensor], without: Sequence[Tensor]) -> None:
    """Raise UserError unless the gradients are the same with and without recomputation; on CPUs bit by bit."""
    # They differ if a block changes its inputs or an outer state, because the second run changes it again.
    if all(torch.equal(one, other) for one, other in zip(with_it, without, strict=True)):
        return

    def norm_of(parts: Iterable[Tensor]) -> float:
        return float(torch.stack([part.float().norm() for part in parts]).norm())

    off = norm_of(one - other for one, other in zip(with_it, without, strict=True))
    norm = norm_of(without)
    # GPU kernels do not add in a fixed order, so their gradients may differ by rounding.
    if without[0].device.type == "cpu" or not off <= 1e-3 * norm:
        raise UserError(
            f"train.activation_checkpointing: it changes the gradients of {family} by {off / norm:.2g}; set it to"
            " false, and lower train.micro_batch or data.max_length if memory is short"
        )


def use_kernels(loss: SupervisedLoss, device: torch.device) -> None:
    """Let kernels compute the parts of the blocks for which they compute the same on the devices of all workers.

    All workers must call it together. Its second call for a model does nothing.
    """
    if device.type != "cuda" or loss.fused is not None:
        return
    found = parts.find(loss, decoder_layers(loss.model))
    dtype = next(loss.parameters()).dtype
    every = collectives.gather([parts.problem(part, dtype, device) for part in found])
    problems = [next(filter(None, told), None) for told in zip(*every, strict=True)]
    loss.fused = [part for part, told in zip(found, problems, strict=True) if told is None]
    parts.switch(loss.fused, device.type)
    why = next(filter(None, problems), "RMSNorm, SwiGLU, RoPE")
    logger.info(f"kernels: for {len(loss.fused)} of {len(found)} parts of the blocks ({why})")


def place_model(
    loss: SupervisedLoss, strategy: str, device: torch.device, replicas: int = 1
) -> None:
    """Move the model to `device`, and with "fsdp" shard the frozen base; `replicas` is as in `shard`.

    May be called again after adapters are added; a sharded base stays sharded.
    """
    install(loss)
    if strategy == "fsdp" and collectives.world_size() > 1 and not loss.sharded:
        shard(loss, device, replicas)
    # FSDP has moved the shards of the base, but not adapters and buffers.
    loss.to(device)
    use_kernels(loss, device)


def shard(loss: SupervisedLoss, device: torch.device, replicas: int = 1) -> None:
    """Shard the blocks of the frozen base; adapters and weights outside the blocks stay whole. Weights may be meta.

    Each of the `replicas` copies is spread over workers with consecutive ranks, which are on the same node as far as
    possible, because Ray numbers the workers node by node.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = collectives.world_size()
    shape: tuple[int, ...] = (world,)
    names: tuple[str, ...] = ("shards",)
    if replicas > 1:
        shape = (replicas, world // replicas)
        names = ("copies", "shards")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    adapters = set[nn.Parameter]()
    for module in loss.modules():
        if isinstance(module, AdaptedWeight):
            adapters |= {module.da, module.db}
    blocks = blocks_to_shard(loss.model)
    whole = adapters | outside(loss, blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=adapters)
    fully_shard(loss, mesh=mesh, ignored_params=whole)
    loss.sharded = True


def outside(model: nn.Module, blocks: Iterable[nn.Module]) -> set[nn.Parameter]:
    inside = set[int]()
    for block in blocks:
        inside.update(map(id, block.parameters()))
    return {parameter for parameter in model.parameters() if id(parameter) not in inside}


def own_rows(parameter: "DTensor") -> tuple[int, int]:
    """Return the rows first..last of a sharded parameter that this worker has; may be empty if there are few rows."""
    # FSDP cuts rows like torch.chunk: all parts but the last have the same size.
    mesh = parameter.device_mesh
    rows = parameter.shape[0]
    size = math.ceil(rows / mesh.size(-1))
    first = min(size * mesh.get_local_rank(mesh.ndim - 1), rows)
    return first, min(first + size, rows)


def begin_at_root(loss: Any) -> None:
    """Make `loss` FSDP's root; call it before a part of a sharded base runs alone."""
    # FSDP takes the first module that runs for the root. If that were a part, the first loss would fail. So an empty
    # method of the root runs first.
    if not loss.sharded:
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    loss.nothing = lambda: None
    register_fsdp_forward_method(loss, "nothing")
    loss.nothing()
    del loss.nothing


# The frozen base of a training: with the weights of its files, or with packed (quantised) linear layers.


def load_frozen(folder: str | Path, config: ModelConfig, device: torch.device) -> "PreTrainedModel":
    """Load a model with `load_model`, and pack its layers by `model.quantization`; packed layers are on `device`.

    Raises the UserErrors of `load_model` and `to_pack`.
    """
    if config.quantization == "none":
        return load_model(folder, config, device)
    began = time.perf_counter()
    require(config.quantization)
    model: Any = empty_model(folder, config, device)
    names = to_pack(model)
    files = sharded_reader.find(Path(folder), model)
    if isinstance(files, BaseFiles):
        packed_folder = _packed(Path(folder), files, names, config.quantization, device)
        for number, name in enumerate(names):
            if packed_folder is None:
                _pack(model, name, files.whole(f"{name}.weight"), config.quantization, device)
            else:
                part = load_file(packed_folder / str(number))
                weight = model.get_submodule(name).weight
                _pack(
                    model,
                    name,
                    weight,
                    config.quantization,
                    device,
                    (part["codes"], part["scales"]),
                )
        sharded_reader.fill(model, files, lambda _: True)
    else:
        logger.info(
            f"quantization: loading the complete base model before packing it, because {files}"
        )
        model = load_model(folder, config, device)
        names = to_pack(model)  # raises UserError for a base that is quantised already
        for name in names:
            _pack(model, name, model.get_submodule(name).weight, config.quantization, device)
    seconds = time.perf_counter() - began
    logger.info(
        f"quantization: {len(names)} linear layers are kept as {config.quantization}, packed or read in {seconds:.2f} s"
    )
    frozen: PreTrainedModel = model
    return frozen


def _packed(
    folder: Path, files: BaseFiles, names: Sequence[str], quantization: str, device: torch.device
) -> Path | None:
    # Packing takes minutes. So one process per node does it, and all later runs read the result.
    dtypes = sorted({str(files.dtypes[f"{name}.weight"]) for name in names})
    key = storage.digest(
        of_folder(folder, code=False), quantization, *dtypes, *names, node_cache.code(), length=32
    )
    root = Path(node_cache.CACHE) / "packed"

    def make(partial: Path) -> None:
        partial.mkdir(exist_ok=True)
        for number, name in enumerate(names):
            codes, scales = pack(files.whole(f"{name}.weight"), quantization, device)
            save_file({"codes": codes.cpu(), "scales": scales.cpu()}, partial / str(number))

    try:
        entry = node_cache.cached(root / key, make)
        node_cache.hold(entry)
        node_cache.make_room(
            root, (each for each in root.iterdir() if not each.name.startswith("."))
        )
    except (OSError, SafetensorError) as error:
        logger.info(
            f"quantization: the packed base model cannot be cached on this node: {short_reason(error)}"
        )
        return None
    return entry


def to_pack(model: nn.Module) -> list[str]:
    """Return the names of the layers to pack, in the model's order; raises UserError if there is none."""
    inside = {id(part) for block in decoder_layers(model) for part in block.modules()}
    shared = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    names = []
    for name in plain_layers(model):
        module: Any = model.get_submodule(name)
        even = module.weight.numel() % 2 == 0  # two numbers share a byte
        if even and id(module) in inside and shared[id(module.weight)] == 1:
            names.append(name)
    if not names:
        raise UserError(
            f"model.quantization: only torch.nn.Linear layers in blocks can be packed, and {type(model).__name__} has"
            " none; set it to none"
        )
    return names


def packed_size(model: nn.Module, quantization: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return (numbers to pack, their packed bytes, bytes that the largest layer takes while it is unpacked)."""
    shapes = [tuple(model.get_parameter(f"{name}.weight").shape) for name in to_pack(model)]
    use = KINDS[quantization]
    return (
        sum(m * n for m, n in shapes),
        sum(use.size(m, n) for m, n in shapes),
        max(m * n for m, n in shapes) * use.unpacking(dtype.itemsize),
    )


def _pack(
    model: nn.Module,
    name: str,
    weight: Tensor,
    quantization: str,
    device: torch.device,
    packed: Packed | None = None,
) -> None:
    # The bias is passed on as it is, and may still be on the meta device.
    parent, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(name)
    setattr(
        model.get_submodule(parent),
        attribute,
        QuantisedLinear(weight, module.bias, quantization, device, packed),
    )


# A base that no worker ever holds whole: built on the meta device, sharded, and filled from its files by rows.


Value = TypeVar("Value")


def load_base(folder: str, config: Config, device: torch.device) -> SupervisedLoss:
    """Load the frozen base of a worker.

    With fsdp and several workers each reads its shard only, if the files can be read by rows; otherwise every worker
    loads the whole base, and `place_model` shards it. All workers must call it together. Raises the UserErrors of
    `load_frozen`.
    """
    if config.cluster.strategy != "fsdp" or collectives.world_size() == 1:
        return SupervisedLoss(
            collectives.together(lambda: load_frozen(folder, config.model, device))
        )
    began = time.perf_counter()
    loss = _sharded(folder, config, device)
    if isinstance(loss, str):
        logger.info(
            f"fsdp: each worker loads the complete base model before sharding it, because {loss}"
        )
        return SupervisedLoss(
            collectives.together(lambda: load_frozen(folder, config.model, device))
        )
    logger.info(
        f"fsdp: each worker has read its part of the base model in {time.perf_counter() - began:.2f} s"
    )
    return loss


def _sharded(folder: str, config: Config, device: torch.device) -> SupervisedLoss | str:
    """Return the base with this worker's shard, or the reason why its files cannot be read by rows.

    All workers return the same type, and the same reason.
    """
    model = collectives.together(lambda: empty_model(folder, config.model, device))
    files = collectives.together(lambda: sharded_reader.find(Path(folder), model))
    problems = collectives.gather(files if isinstance(files, str) else None)
    if isinstance(files, str) or any(problems):
        return next(problem for problem in problems if problem)
    whole = outside(model, blocks_to_shard(model))
    wanted = {weight for weight in model.parameters() if weight.dim() < 2 or weight in whole}
    collectives.together(
        lambda: sharded_reader.fill(
            model, files, wanted.__contains__, partial(_whole, files, device)
        )
    )
    loss: Any = SupervisedLoss(model)  # torch leaves `_apply` untyped
    loss.read_rows = files.rows
    shard(loss, device, config.cluster.fsdp_replicas)
    # Tensors on the meta device, above all shards of weights, get memory here; all others already have their values.
    loss._apply(
        lambda part: torch.empty_like(part, device=device) if part.is_meta else part.to(device)
    )
    collectives.together(lambda: _read_shards(model, files))
    sharded: SupervisedLoss = loss
    return sharded


@torch.no_grad()
def _read_shards(model: nn.Module, files: BaseFiles) -> None:
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not isinstance(parameter.data, DTensor):
            continue
        shard_of: Tensor = parameter.data.to_local()
        first, last = own_rows(parameter.data)
        assert shard_of.shape[0] == last - first
        _read_rows(files, name, first, shard_of)


def _whole(files: BaseFiles, device: torch.device, name: str) -> Tensor:
    # A large weight is read into the device's memory, so that the node's memory never holds more than a few rows of it.
    if len(files.shapes[name]) < 2:
        return files.whole(name)
    if device.type == "cpu" and (mapped := files.mapped(name)) is not None:
        return mapped
    weight = torch.empty(files.shapes[name], dtype=files.dtypes[name], device=device)
    _read_rows(files, name, 0, weight)
    return weight


def _read_rows(files: BaseFiles, name: str, first: int, to: Tensor) -> None:
    """Fill the tensor `to` with rows of a weight from row `first` on, at most 64 MiB (or one row) at a time."""
    count = (
        max(1, 2**26 * len(to) // max(to.nbytes, 1)) if files.in_parts(name) else max(1, len(to))
    )
    for start in range(0, len(to), count):
        stop = min(start + count, len(to))
        to[start:stop].copy_(files.rows(name, first + start, first + stop))
