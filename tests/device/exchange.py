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

import torch
import torch.distributed as dist
from torch import Tensor

from olora_ray.common import collectives
from olora_ray.train.loop import Trainer


class Rules:
    """What stands in for torch.distributed in the package."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        """Kind of exchange -> how often."""
        self.in_step = False

    def carried(self, kind: str, tensor: Tensor) -> Tensor:
        """Return the copy that is exchanged instead of a tensor; raises AssertionError if NCCL would not take it."""
        assert tensor.is_cuda, f"{kind}: NCCL takes no tensor of the {tensor.device.type}"
        assert tensor.is_contiguous(), f"{kind}: NCCL takes only contiguous tensors"
        self.sent[kind] += 1
        return tensor.detach().cpu()

    def all_reduce(self, tensor: Tensor) -> None:
        copy = self.carried("all_reduce", tensor)
        dist.all_reduce(copy)
        tensor.copy_(copy)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        copy = self.carried("broadcast", tensor)
        dist.broadcast(copy, src=src)
        tensor.copy_(copy)

    def batch_isend_irecv(self, operations: Sequence[Any]) -> list[Any]:
        return [self._begun(each.op, each.tensor, each.peer) for each in operations]

    def _begun(self, operation: Callable[..., Any], tensor: Tensor, peer: int) -> Any:
        copy = self.carried(operation.__name__, tensor)
        work = operation(copy, peer)

        @torch.no_grad()
        def wait() -> None:
            work.wait()
            if operation is dist.irecv:
                tensor.copy_(copy)

        return SimpleNamespace(wait=wait)

    def objects(self, exchange: Callable[..., None]) -> Callable[..., None]:
        def guarded(*arguments: Any, **named: Any) -> None:
            assert not self.in_step, f"{exchange.__name__}: a step sends no objects"
            exchange(*arguments, **named)

        return guarded


@contextlib.contextmanager
def by_nccls_rules() -> Iterator[Rules]:
    """Let the package exchange tensors of the device, as long as NCCL would."""
    rules, steps = Rules(), Trainer.steps

    def watched(trainer: Trainer, *arguments: Any) -> Generator[Any]:
        results = steps(trainer, *arguments)
        while True:
            rules.in_step = True
            try:
                result = next(results, None)
            finally:
                rules.in_step = False
            if result is None:
                return
            yield result

    own = {name: getattr(rules, name) for name in ("all_reduce", "broadcast", "batch_isend_irecv")}
    own |= {name: rules.objects(getattr(dist, name)) for name in ("all_gather_object", "broadcast_object_list")}
    with (
        mock.patch.object(collectives, "dist", SimpleNamespace(**vars(dist) | own)),
        mock.patch.object(Trainer, "steps", watched),
    ):
        yield rules
