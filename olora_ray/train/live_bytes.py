"""Bytes of the tensors that are alive while something runs: how many now, and how many at most."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
