"""A layer with the shapes of an 8B model starts few kernels, and its adapters move few bytes."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olora_ray.adapter.inject import find_targets
from olora_ray.config.schema import Adapter
from olora_ray.train.fake_model import FakeModel
from tests import tiny

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


class Work(TorchDispatchMode):
    """Counts kernels (all operations but views and allocations), and the bytes of what they read and write."""

    kernels = bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        words = set(func.overloadpacket.__name__.split("_"))
        if (
            func.namespace == "aten"
            and not func.is_view
            and not words & {"empty", "detach", "unsafe"}
        ):
            self.kernels += 1
            self.bytes += sum(
                part.nbytes for part in tree_leaves((args, result)) if isinstance(part, Tensor)
            )
        return result


def work(adapted: bool) -> Work:
    """Return the work of a layer in the second micro-batch of 2 x 4,096 tokens, forward and backward."""
    with torch.device("meta"):
        model = tiny.llama(**SIZES)
    fake = FakeModel(
        model,
        find_targets(model, "all-linear", 16) if adapted else {},
        Adapter(rank=16),
        torch.bfloat16,
    )
    with fake.mode:
        for _ in range(2):
            x, angles = (
                torch.empty(2, 4096, 4096).bfloat16().requires_grad_(),
                torch.empty(2, 1, 4096, 128).bfloat16(),
            )
            with Work() as found:
                fake.blocks[1](x, position_embeddings=tuple(angles), attention_mask=None).backward(
                    x
                )
    return found


def test_adapters_add_few_kernels_and_bytes() -> None:
    frozen, adapted = work(False), work(True)
    assert adapted.kernels <= 155  # each layer by itself; layers of one input together took 140
    # The low-rank path has to read x and the gradients of y twice, and to read and write y and the gradients of x. Each
    # layer does so by itself: layers of one input together took 4 GiB.
    assert adapted.bytes - frozen.bytes <= 5.1 * 2**30
