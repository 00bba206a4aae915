"""A count of the kernels that a program would start on a GPU, and of the bytes they move: on tensors without data."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
_WIDE = 512
"""Smallest dimension of a product that does not count as thin."""


class Kernels(TorchDispatchMode):
    """Count operators that are no views, by name, within a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        """Name of an operator, or of a kernel of train/parts.py; of products `product` or `thin product`, after their
        smallest dimension."""
        self.bytes: Counter[str] = Counter()
        """Bytes that are read and written, for `product`, `thin product`, `attention` and `elementwise`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace not in ("aten", "olora_ray") or name in _VIEWS:
            return result
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        size = sum(each.numel() * each.itemsize for each in given)
        if name not in ("fill_", "zero_", "copy_"):  # these do not read what they replace
            size += sum(each.numel() * each.itemsize for each in made)
        kind = "elementwise"
        if name in ("mm", "addmm", "addmm_"):
            left, right = [each for each in given if each.dim() == 2][-2:]
            kind = name = "product" if min(*left.shape, right.shape[1]) >= _WIDE else "thin product"
        elif "attn" in name:
            kind = "attention"
        self.counts[name] += 1
        self.bytes[kind] += size
        return result
