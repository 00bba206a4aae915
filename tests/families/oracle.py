"""A model's own results: losses, gradients and leaks by its own forward pass, without anything of olora_ray.

Examples are evaluated one by one, in the attention that transformers itself picks, so that nothing here depends on
how examples are laid out, masked or packed. (Eager attention gives the same in all families of the zoo but Falcon
with ALiBi, to which transformers 5.24 adds the bias twice.)
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import tiny

Shape = tuple[int, ...]


def load(folder: Path, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """The frozen model of a folder, with the attention that transformers picks unless it is named."""
    from olora_ray.model.folder import text_class

    model = text_class(folder).from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def losses(model: Any, packs: Sequence[Any]) -> Tensor:
    """The loss of each supervised token of all examples, in order, in float32."""
    return torch.cat([_losses(model, example) for example in tiny.unpacked(packs)])


def gradients(model: Any, packs: Sequence[Any], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """d (mean loss per supervised token) / d W for modules, or for parameters of many experts, by name.

    `shapes` says what is m and what is n: (m, n), or (experts, m, n).
    """
    weights = {name: _weight(model, name) for name in shapes}
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = torch.cat([_losses(model, example) for example in tiny.unpacked(packs)]).mean()
    found = torch.autograd.grad(
        loss, list(weights.values()), allow_unused=True, materialize_grads=True
    )
    for weight in weights.values():
        weight.requires_grad_(False)
    return {
        name: (part.mT if _is_stored_transposed(model, name, part, shape) else part).float()
        for part, (name, shape) in zip(found, shapes.items(), strict=True)
    }


@torch.no_grad()
def leaks(model: Any, packs: Sequence[Any]) -> float | None:
    """Mean difference of a token's loss, relative to the mean loss, if only positions separate examples.

    None for a model that takes no positions.
    """
    parts = []
    for pack in packs:
        positions = torch.cat([torch.arange(length) for length in pack.segments])[None]
        ids = torch.from_numpy(pack.input_ids.astype(np.int64))[None]
        try:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        except TypeError:
            return None
        parts.append(_cross_entropy(logits[0], ids[0], _supervised(pack)))
    return difference(torch.cat(parts), losses(model, packs))


def difference(found: Tensor, wanted: Tensor) -> float:
    """Mean absolute difference of losses of tokens, relative to the mean loss: nothing cancels."""
    return float((found.float() - wanted.float()).abs().mean() / wanted.float().mean())


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all gradients together, relative to the norm of the correct ones."""
    assert found.keys() == wanted.keys()
    apart = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    whole = sum(float(part.square().sum()) for part in wanted.values())
    return float((apart / whole) ** 0.5)


def _losses(model: Any, example: Any) -> Tensor:
    ids = torch.from_numpy(example.input_ids.astype(np.int64))
    return _cross_entropy(
        model(input_ids=ids[None], use_cache=False).logits[0], ids, _supervised(example)
    )


def _supervised(pack: Any) -> Tensor:
    """Positions of supervised tokens; the first token of an example is never one."""
    marked = np.flatnonzero(pack.supervised)
    assert not set(marked) & {0, *accumulate(pack.segments)}
    return torch.from_numpy(marked)


def _cross_entropy(logits: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
    return F.cross_entropy(logits[positions - 1].float(), ids[positions], reduction="none")


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    """A linear module's weight, or the parameter of that name, which holds the weights of many experts."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters[f"{name}.weight"] if f"{name}.weight" in parameters else parameters[name]


def _is_stored_transposed(model: nn.Module, name: str, weight: Tensor, shape: Shape) -> bool:
    """True if a weight is stored as n x m; if both are equal, for GPT-2's Conv1D."""
    if weight.shape[-1] != weight.shape[-2]:
        return tuple(weight.shape) != shape
    return weight.dim() == 2 and type(model.get_submodule(name)).__name__ == "Conv1D"
