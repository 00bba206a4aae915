"""A model that trains without memory: its tensors are fake, and only one of each set of equal blocks runs.

The other blocks return their input.
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
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import method_named
from olora_ray.config.decided import Recompute
from olora_ray.config.schema import Adapter
from olora_ray.tokens.collate import Batch
from olora_ray.train import parallel
from olora_ray.train.loop import train_mode
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.price import Kernels
from olora_ray.train.sharded_reader import decoder_layers

_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx"})
"""Attributes with the index of a block in the families' code; equal blocks differ in it."""


class FakeModel:
    """A model from the meta device that trains with fake tensors; the original is unusable afterwards."""

    def __init__(
        self, model: Any, targets: Mapping[str, Target], adapter: Adapter, dtype: torch.dtype
    ) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        self.loss = SupervisedLoss(model.requires_grad_(False).eval())
        self.blocks = decoder_layers(model)
        # One block of each type runs, and also the first block, which differs because its input needs no gradient.
        types = [_type(model, index, block) for index, block in enumerate(self.blocks)]
        first: dict[Any, int] = {}
        for index, block_type in enumerate(types[1:], 1):
            first.setdefault(block_type, index)
        counts = Counter(types[1:])
        self.more = {index: counts[block_type] - 1 for block_type, index in first.items()}
        """Index of a block that runs -> number of skipped blocks of its type."""
        self.skipped = sorted(set(range(1, len(self.blocks))) - set(self.more))
        hidden = set[int]()
        for index in self.skipped:
            hidden.update(map(id, self.blocks[index].modules()))
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
        train_mode(self.adapted, True)

    def tensors(self) -> list[Tensor]:
        tensors = [*self.loss.parameters(), *self.loss.buffers()]
        return tensors + [part.grad for part in tensors if part.grad is not None]

    def without_numbers(self, batch: Batch) -> Batch:
        """Return the batch with fake tokens and positions.

        transformers checks their values only if they are not fake. The borders of segments stay real, because segment
        attention runs by their values.
        """
        inputs = dict(batch.inputs)
        for name, value in batch.inputs.items():
            if isinstance(value, Tensor) and value.dtype == torch.int64:
                inputs[name] = torch.empty_like(value)
        return replace(batch, inputs=inputs)

    @contextmanager
    def counting(self, kernels: Kernels, head: float) -> Iterator[None]:
        """Let the kernels of a block that runs count for all blocks of its type, and those of the head `head` times."""
        # The backward pass of a block begins when the gradient of its output is there.

        def begin(times: float, *_: object) -> None:
            kernels.times = times

        def end(times: float, _block: nn.Module, _inputs: object, output: Any) -> None:
            kernels.times = head
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(partial(begin, times))

        handles = []
        for index in (0, *self.more):
            times = 1.0 + self.more.get(index, 0)
            handles.append(self.blocks[index].register_forward_pre_hook(partial(begin, times)))
            handles.append(self.blocks[index].register_forward_hook(partial(end, times)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run_again(self, on: Recompute) -> None:
        self.loss.recompute = on
        parallel.install(self.loss)
        # `install` may have wrapped the forwards of skipped blocks too, so they are replaced after it.
        for index in self.skipped:
            self.blocks[index].__dict__["forward"] = _Skipped(self.blocks[index - 1])


# Replaces the module's own weights and buffers by fake tensors on a CPU.
def _materialise(module: nn.Module) -> None:
    for name, weight in module._parameters.items():
        if weight is not None:
            fake = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
            module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _factors(target: Target, adapter: Adapter) -> Factors:
    m, n = target.shape
    rank = adapter.rank
    experts = () if target.experts is None else (target.experts,)
    b0 = torch.empty(*experts, m, rank) if method_named(adapter.method).has_b0 else None
    return Factors(torch.empty(*experts, rank, n), b0)


class GroupedProducts(TorchDispatchMode):
    """Mode in which the grouped product of all experts returns an empty result of the right shape.

    On fake tensors torch computes this product in bfloat16 only, although it accepts other precisions on real ones.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dim() == 2:
            a, b, ends = args[:3]
            if b.dim() == 3:
                return a.new_empty(len(a), b.shape[-1])
            return a.new_empty(len(ends), len(a), b.shape[-1])
        return func(*args, **(kwargs or {}))


def _type(model: Any, index: int, block: nn.Module) -> tuple[Any, ...]:
    """Return a key that equal blocks share: classes, sizes and settings of their parts, and the type in the config."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    parts = []
    for name, part in block.named_modules():
        shapes = [(key, weight.shape) for key, weight in part.named_parameters(recurse=False)]
        settings = [
            (key, value)
            for key, value in vars(part).items()
            if isinstance(value, bool | int | float | str) and key not in _NUMBERS
        ]
        parts.append((name, type(part), tuple(shapes), tuple(settings)))
    return tuple(parts), types[index] if index < len(types) else None


class _Skipped:
    """Forward of a skipped block: returns its input, in the same form as the previous block."""

    def __init__(self, before: nn.Module) -> None:
        self.length: int | None = None
        """Length of the tuple that the previous block returns; None: it returns a tensor."""

        def look(_module: nn.Module, _inputs: object, output: Any) -> None:
            self.length = len(output) if isinstance(output, tuple) else None

        before.register_forward_hook(look)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        hidden = inputs[0] if inputs else named["hidden_states"]
        if self.length is None:
            return hidden
        return (hidden, *[None] * (self.length - 1))


# Bytes of the tensors that are alive while a model runs: the current number and the peak.


class LiveBytes(TorchDispatchMode):
    """Mode that counts the memory of every tensor that an operation creates, until it is freed.

    Memory that several tensors share, such as views, counts once. The memory of the tensors `known` does not count.
    Fake tensors count as if they were real. Scratch memory inside a kernel is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: dict[int, Any] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = (
                storage  # kept alive, so that no other storage gets this address
            )

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            number = storage._cdata
            size = storage.nbytes()
            if number not in self._seen:
                self._seen[number] = weakref.ref(storage, partial(self._freed, number, size))
                self.now += size
                self.most = max(self.most, self.now)
        return result

    def _freed(self, number: int, size: int, _: object) -> None:
        del self._seen[number]
        self.now -= size


@contextmanager
def at_blocks(blocks: Sequence[nn.Module], live: LiveBytes) -> Iterator[list[int]]:
    """Yield a list that gets the bytes alive at the start of each block, and after the last block."""
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
