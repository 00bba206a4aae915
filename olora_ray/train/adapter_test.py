"""Test of a model's adapters before the first step: they change nothing yet, and each receives a gradient.

Of experts that are modules of their own some receive one: a few tokens are not sent to all of them.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from olora_ray.adapter.experts import AdaptedExperts
from olora_ray.adapter.layer import AdaptedLinear, AdaptedWeight
from olora_ray.common.errors import UserError, first_line
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import Pack
from olora_ray.train import recompute
from olora_ray.train.examples import SHORT, examples_of, one_pack
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import begin_at_root

_EXPERT = re.compile(r"([^.]*expert[^.]*)\.(?:expert_)?\d+(?=\.)")
"""The number of an expert that is a module of its own, as in `mlp.experts.3.up_proj`."""


def check_adapters(
    loss: SupervisedLoss,
    adapted: Mapping[str, AdaptedWeight],
    packs: Sequence[Pack],
    name: str,
    device: torch.device,
    new: bool,
) -> None:
    """Raise UserError unless untrained (`new`) adapters change no bit of a loss, and each receives a gradient.

    `name` is the attention. The gradients are left at zero.
    """
    examples = list(examples_of(packs, SHORT))[:3]
    batch = collate([one_pack([ids]) for ids in examples], name).to(device)
    try:
        without = _try(loss, adapted, batch, new)
    except NotImplementedError as error:  # of experts' weights that are used in a way that is not known here
        raise UserError(f"adapter.targets: {first_line(error)}; leave the experts out of adapter.targets") from None
    if without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise UserError(
            f"adapter.targets: {', '.join(without[:3])}{more} take no part in what the model makes of text: no gradient"
            " reaches them; leave them out"
        )


def _try(loss: SupervisedLoss, adapted: Mapping[str, AdaptedWeight], batch: Batch, new: bool) -> list[str]:
    """The adapters that no gradient reaches; raises UserError if untrained ones change a loss."""
    begin_at_root(loss)
    if new:
        losses = loss.each(batch)
        with bare(loss.model):
            base = loss.each(batch)
        if not torch.equal(losses, base):
            off = float((losses - base).abs().mean())
            raise UserError(
                f"model.name: {type(loss.model).__name__} with untrained adapters differs by {off:.2g} from the"
                " base: one of adapter.targets is not a plain linear layer"
            )
    gradients = _gradients(loss, adapted, batch)
    if loss.recompute:
        with recompute.switched(loss, on=False):
            other = _gradients(loss, adapted, batch)
        recompute.check_same(
            type(loss.model).__name__,
            *([part for pair in parts.values() for part in pair] for parts in (gradients, other)),
        )
    reached = {layer for layer, parts in gradients.items() if any(bool((part != 0).any()) for part in parts)}
    return _missed(gradients, reached)


def _missed(adapted: Collection[str], reached: Collection[str]) -> list[str]:
    """The adapters that no gradient has reached; no expert beside which another was: few tokens go to some alone."""
    kinds = {_EXPERT.sub(r"\1.*", layer) for layer in reached}
    return [layer for layer in adapted if layer not in reached and _EXPERT.sub(r"\1.*", layer) not in kinds]


def _gradients(loss: SupervisedLoss, adapted: Mapping[str, AdaptedWeight], batch: Batch) -> dict[str, list[Tensor]]:
    """What reaches dA and dB of each adapter; zeros are left where it was."""
    total: Tensor = loss(batch)
    total.backward()
    found: dict[str, list[Tensor]] = {}
    for layer, module in adapted.items():
        parts = [part.grad for part in (module.da, module.db) if part.grad is not None]
        found[layer] = [part.clone() for part in parts]
        for part in parts:
            part.zero_()
    return found


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Without their low-rank paths for now: a sharded base cannot be taken out of its adapters."""
    layers: list[Any] = [part for part in model.modules() if isinstance(part, AdaptedLinear | AdaptedExperts)]
    for layer in layers:
        layer.__dict__["forward"] = layer.base.__call__  # as an attribute it would be a module of the layer
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
