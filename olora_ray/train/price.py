"""The price of a step: its kernels, counted on tensors without data, and the time that they take on a card.

    seconds = sum over kernels of max(operations / rate, bytes / bandwidth) + launch

It has the forward and backward passes, without optimizer and exchange.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Work = Mapping[tuple[float, float], float]
"""(Operations, bytes) of a kernel -> number of such kernels."""

_VIEWS = frozenset(
    (
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "is_same_size",
        "lift_fresh",
        "narrow",
        "new_empty",
        "new_empty_strided",
        "permute",
        "reshape",
        "select",
        "set_data",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "sym_size",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
    )
)
_PRODUCTS = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}
"""Product of matrices -> index of its left matrix in its arguments."""
_WIDE = 512
"""Smallest dimension of a product that does not count as thin."""


class Kernels(TorchDispatchMode):
    """Count operators that are no views, by name, within a `with` block."""

    def __init__(self, attended: float = 0.0) -> None:
        """`attended`: pairs of tokens that attend to each other, per token of the batch."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.attended = attended
        self.times = 1.0
        """Number of kernels for which each one counts in `work`."""
        self.counts: Counter[str] = Counter()
        """Name of the operator, or of a kernel of train/parts.py; of products `product` or `thin product`, after their
        smallest dimension."""
        self.bytes: Counter[str] = Counter()
        """Bytes that are read and written, for `product`, `thin product`, `attention` and `elementwise`."""
        self.work: dict[tuple[float, float], float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_attention = "attn" in name or "attention" in name
        counted = func.namespace in ("aten", "olora_ray")
        if name in _VIEWS or not (counted or is_attention):
            return result
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        size = sum(each.numel() * each.itemsize for each in given)
        if name not in ("fill_", "zero_", "copy_"):  # these do not read what they replace
            size += sum(each.numel() * each.itemsize for each in made)
        kind = "elementwise"
        operations = 0.0
        if name in _PRODUCTS:
            left = args[_PRODUCTS[name]]
            operations = 2.0 * made[0].numel() * left.shape[-1]
            if made[0].dim() == 2:
                thin = min(*left.shape, made[0].shape[1]) < _WIDE
                kind = name = "thin product" if thin else "product"
        elif is_attention:
            kind = "attention"
            # Two products forward and five backward, each over the causal half of the pairs.
            products = 5 if "backward" in name else 2
            operations = 2.0 * products * given[0].numel() * self.attended
        if counted:
            self.counts[name] += 1
            self.bytes[kind] += size
        kernel = (operations, float(size))
        self.work[kernel] = self.work.get(kernel, 0.0) + self.times
        return result


# The cards.


@dataclass(frozen=True)
class Card:
    rate: float
    """Operations per second of large products."""
    bandwidth: float
    """Bytes per second of the card's memory."""
    launch: float
    """Seconds that each kernel costs beside its work."""


PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 125.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}
"""Part of a GPU's name -> TFLOP/s in bfloat16, dense, as its maker states it."""
BANDWIDTHS = {
    "H100 PCIe": 2.0,
    "H100 NVL": 3.9,
    "H100": 3.35,
    "H200": 4.8,
    "A100 SXM4 80GB": 2.039,
    "A100 80GB": 1.935,
    "L40S": 0.864,
    "A10G": 0.6,
    "RTX 4090": 1.008,
}
"""Part of a GPU's name -> TB/s of its memory, from NVIDIA's data sheets (of the A10G: AWS's page of G5 instances)."""
# Estimated, because no card has been measured: what products and other kernels reach of the makers' numbers, and the
# seconds from the end of one kernel to the start of the next.
OF_RATE = 0.65
OF_BANDWIDTH = 0.8
LAUNCH = 6e-6


def peak_of(name: str) -> float | None:
    """Return the operations per second that the maker of a GPU states; None for an unknown one, and for a CPU."""
    known = _entry(PEAKS, name)
    return None if known is None else known * 1e12


def card_of(name: str) -> Card | None:
    """Return what a GPU reaches; None for an unknown one."""
    peak = peak_of(name)
    bandwidth = _entry(BANDWIDTHS, name)
    if peak is None or bandwidth is None:
        return None
    return Card(OF_RATE * peak, OF_BANDWIDTH * bandwidth * 1e12, LAUNCH)


def _entry(table: Mapping[str, float], name: str) -> float | None:
    # The longest match of whole words: "A100-SXM4" is one, "RTX A1000" is none.
    words = f" {name} ".replace("-", " ").lower()
    known = max((part for part in table if f" {part.lower()} " in words), key=len, default=None)
    return None if known is None else table[known]


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what bounds its kernels."""

    products: float
    memory: float
    launches: float

    @property
    def seconds(self) -> float:
        return self.products + self.memory + self.launches

    def line(self, card: str) -> str:
        return (
            f"a step takes about {self.seconds:.2g} s on {card} ({self.products:.2g} products, {self.memory:.2g}"
            f" memory, {self.launches:.2g} launches)"
        )


def step_time(work: Work, card: Card, micro_batches: int = 1) -> StepTime:
    """Return the time of a step with this work in each of its micro-batches."""
    products = memory = 0.0
    for (operations, size), count in work.items():
        of_products = operations / card.rate
        of_memory = size / card.bandwidth
        if of_products > of_memory:
            products += count * of_products
        else:
            memory += count * of_memory
    launches = card.launch * sum(work.values())
    return StepTime(micro_batches * products, micro_batches * memory, micro_batches * launches)
