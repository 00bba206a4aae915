"""A model without memory that trains: fake tensors instead of weights, and only as many blocks as differ.

The other blocks hand their input on. Which tokens are sent to which expert, no fake tensor tells: each expert is taken
to get as many.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olora_ray.adapter.candidates import Target
from olora_ray.adapter.inject import inject
from olora_ray.adapter.layer import AdaptedStack, Factors
from olora_ray.adapter.methods import METHODS
from olora_ray.config.schema import Adapter
from olora_ray.tokens.collate import Batch
from olora_ray.train import parallel
from olora_ray.train.base_files import decoder_layers
from olora_ray.train.loop import train_mode
from olora_ray.train.loss import SupervisedLoss

_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx"})
"""Names of a block's number in the families' code; two equal blocks differ in it."""


class FakeModel:
    """A model on the meta device, made to train with fake tensors; it is used up by that."""

    def __init__(self, model: Any, targets: Mapping[str, Target], adapter: Adapter, dtype: torch.dtype) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        self.loss = SupervisedLoss(model.requires_grad_(False).eval())
        self.blocks = decoder_layers(model)
        self._choose(model)
        hidden = {id(part) for place in self.skipped for part in self.blocks[place].modules()}
        run = {name for name, module in model.named_modules() if id(module) not in hidden}
        with self.mode:
            for name in run:
                _materialise(model.get_submodule(name))
            factors = {
                name: _factors(target, adapter)
                for name, target in targets.items()
                if (name if target.experts is None else name.rpartition(".")[0]) in run
            }
            self.adapted = inject(model, factors, adapter.scale(), adapter.dropout)
            for layer in self.adapted.values():
                for part in (layer.da, layer.db):
                    part.grad = torch.empty_like(part)
                if isinstance(layer, AdaptedStack):
                    layer.__dict__["ends"] = partial(_even, experts=len(layer.da))
        train_mode(self.adapted, True)

    def _choose(self, model: Any) -> None:
        """Which blocks are run: the first, whose input wants no gradient, and one of each kind of the others."""
        kinds = [_kind(model, place, block) for place, block in enumerate(self.blocks)]
        first: dict[Any, int] = {}
        for place, kind in enumerate(kinds[1:], 1):
            first.setdefault(kind, place)
        counts = Counter(kinds[1:])
        self.more = {place: counts[kind] - 1 for kind, place in first.items()}
        """Place of a block that is run -> how many more there are of its kind."""
        self.skipped = sorted(set(range(1, len(self.blocks))) - set(self.more))

    def tensors(self) -> list[Tensor]:
        """Weights, buffers and gradients: what is there before a step."""
        found = [*self.loss.parameters(), *self.loss.buffers()]
        return found + [part.grad for part in found if part.grad is not None]

    def without_numbers(self, batch: Batch) -> Batch:
        """The batch with fake tokens and positions, by which transformers knows not to look at their values.

        The borders of segments stay: segment attention is a program of their values.
        """
        inputs = {
            name: torch.empty_like(value) if isinstance(value, Tensor) and value.dtype == torch.int64 else value
            for name, value in batch.inputs.items()
        }
        return replace(batch, inputs=inputs)

    def run_again(self, on: bool) -> None:
        """Turn recomputation of blocks in the backward pass on or off (train/parallel.py)."""
        self.loss.recompute = on
        parallel.install(self.loss)
        for place in self.skipped:
            self.blocks[place].__dict__["forward"] = _Skipped(self.blocks[place - 1])


def _materialise(module: nn.Module) -> None:
    """Own weights and buffers become fake tensors on a CPU."""
    for name, weight in module._parameters.items():
        if weight is not None:
            fake = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
            module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _factors(target: Target, adapter: Adapter) -> Factors:
    (m, n), rank = target.shape, adapter.rank
    experts = () if target.experts is None else (target.experts,)
    b0 = torch.empty(*experts, m, rank) if METHODS[adapter.method].has_b0 else None
    return Factors(torch.empty(*experts, rank, n), b0)


def _even(rows: int, _ends: Tensor, experts: int) -> list[int]:
    """The ends of the experts' rows, if all have about as many."""
    return [rows * (expert + 1) // experts for expert in range(experts)]


class GroupedProducts(TorchDispatchMode):
    """While it is entered, products of all experts at once give a result of their form in every precision.

    torch refuses all but bfloat16 of tensors that have no numbers, and computes others of those that have.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See torch's documentation, "Extending all torch API with Modes"."""
        if func is torch.ops.aten._grouped_mm.default and args[0].dim() == 2 and args[1].dim() == 3:
            return args[0].new_empty(len(args[0]), args[1].shape[-1])
        return func(*args, **(kwargs or {}))


def _kind(model: Any, place: int, block: nn.Module) -> tuple[Any, ...]:
    """The same for blocks that do the same: classes, sizes and settings of their parts, and what the config says."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    parts = tuple(
        (
            name,
            type(part),
            tuple((key, weight.shape) for key, weight in part.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in vars(part).items()
                if isinstance(value, bool | int | float | str) and key not in _NUMBERS
            ),
        )
        for name, part in block.named_modules()
    )
    return parts, types[place] if place < len(types) else None


class _Skipped:
    """The forward of a block that is not run: its input, in the form in which the block before it answers."""

    def __init__(self, before: nn.Module) -> None:
        self.length: int | None = None
        """Length of the tuple that the block before returns; None: it returns a tensor."""
        before.register_forward_hook(self._look)

    def _look(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        self.length = len(output) if isinstance(output, tuple) else None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The hidden states that it is given."""
        hidden = inputs[0] if inputs else named["hidden_states"]
        return hidden if self.length is None else (hidden, *[None] * (self.length - 1))


# Bytes of the tensors that are alive while something runs: how many now, and how many at most.


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the memory behind every tensor that an operation makes, until that is freed.

    Views and results in place have the memory of another tensor, which counts once; `known` are tensors whose memory
    does not count. Works with fake tensors, whose memory is not there. What a kernel takes for itself is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: dict[int, Any] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage  # kept, so that no other memory gets its number

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See torch's documentation, "Extending all torch API with Modes"."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self._seen:
            return
        self._seen[number] = weakref.ref(storage, partial(self._freed, number, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _freed(self, number: int, size: int, _: object) -> None:
        del self._seen[number]
        self.now -= size


@contextmanager
def at_blocks(blocks: Sequence[nn.Module], live: LiveBytes) -> Iterator[list[int]]:
    """While it is entered, the list gets the bytes that are alive as each block begins, and after the last."""
    before: list[int] = []

    def note(*_: object) -> None:
        before.append(live.now)

    handles = [block.register_forward_pre_hook(note) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(note))
    try:
        yield before
    finally:
        for handle in handles:
            handle.remove()
