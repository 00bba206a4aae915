"""NCCL's rules for exchanges between workers, carried by gloo through copies on the CPU.

NCCL takes tensors on a device only, and contiguous ones only. It sends objects too, but each waits for the device: so
none may be sent inside a step.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from olora_ray.common import collectives
from olora_ray.train.loop import Trainer


class Rules:
    """What stands in for functions of torch.distributed."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        """Kind of exchange -> how often."""
        self._in_step = False

    def _copy(self, kind: str, tensor: Tensor) -> Tensor:
        """Return the copy that is exchanged for a tensor; raises AssertionError if NCCL would not take the tensor."""
        assert tensor.is_cuda, f"{kind}: NCCL takes no tensor of the {tensor.device.type}"
        assert tensor.is_contiguous(), f"{kind}: NCCL takes only contiguous tensors"
        self.sent[kind] += 1
        return tensor.detach().cpu()

    def all_reduce(self, tensor: Tensor) -> None:
        copy = self._copy("all_reduce", tensor)
        dist.all_reduce(copy)
        tensor.copy_(copy)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        copy = self._copy("broadcast", tensor)
        dist.broadcast(copy, src=src)
        tensor.copy_(copy)

    def batch_isend_irecv(self, operations: Sequence[Any]) -> list[Any]:
        copies = [self._copy(each.op.__name__, each.tensor) for each in operations]
        for work in [
            each.op(copy, each.peer) for each, copy in zip(operations, copies, strict=True)
        ]:
            work.wait()
        for each, copy in zip(operations, copies, strict=True):
            if each.op is dist.irecv:
                each.tensor.detach().copy_(copy)
        return []

    def objects(self, exchange: Callable[..., None]) -> Callable[..., None]:
        def guarded(*arguments: Any, **named: Any) -> None:
            assert not self._in_step, f"{exchange.__name__}: a step sends no objects"
            exchange(*arguments, **named)

        return guarded

    def steps(self, whole: Callable[..., Any], *arguments: Any) -> Generator[Any]:
        results = whole(*arguments)
        while True:
            self._in_step = True
            try:
                result = next(results, None)
            finally:
                self._in_step = False
            if result is None:
                return
            yield result


@contextlib.contextmanager
def by_nccls_rules() -> Iterator[Rules]:
    """Let the package exchange tensors of the device, as long as NCCL would."""
    rules, steps = Rules(), Trainer.steps
    own = {name: getattr(rules, name) for name in ("all_reduce", "broadcast", "batch_isend_irecv")}
    own["all_gather"] = rules.objects(dist.all_gather)
    with (
        mock.patch.object(collectives, "dist", SimpleNamespace(**vars(dist) | own)),
        mock.patch.object(Trainer, "steps", lambda *arguments: rules.steps(steps, *arguments)),
    ):
        yield rules
