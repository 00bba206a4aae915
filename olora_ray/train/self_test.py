"""Self-test of a model before the first step: does training compute what the model computes, whatever its family?

On a few tokens of three examples, on the worker, with the model where it will be trained:

- **loss**: the training loss of each token is the cross-entropy of the model's own logits;
- **alone**: the losses of an example are those of the model in its own attention, with nothing beside it;
- **beside others**: an example's losses are the same in a sequence or a micro-batch with others, and not one bit of
  them depends on what the others say, or on what comes after;
- **start**: with the adapters in place and untrained, every loss has the bits of the base model's;
- **gradient**: every adapter receives one.

The first attention (model/attention.py) that passes is used. Losses that may differ by rounding are seen against
what rounding explains, which is measured: the output of every block is moved at random by up to half a unit in its
last place.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.adapter.experts import AdaptedExperts
from olora_ray.adapter.layer import AdaptedLinear, AdaptedWeight
from olora_ray.common.errors import UserError, first_line
from olora_ray.config.evaluation import AnyConfig
from olora_ray.model import attention
from olora_ray.model.packing import why_apart
from olora_ray.tokens.collate import FLAT_ATTENTION, Batch, collate
from olora_ray.tokens.store import Pack
from olora_ray.train.blocks import decoder_layers
from olora_ray.train.loss import SupervisedLoss

logger = logging.getLogger(__name__)

SHORT = 24
"""Tokens of an example: rounding and leaks show in a few."""
MARGIN, MARGIN_OF_EXPERTS = 10.0, 40.0
"""A mean difference may be this many times what rounding explains (observed: up to 4 times, and 10 times where
rounding decides which expert a token goes to)."""
FLOOR = 2.0**-19
"""Smallest difference of a loss that counts, relative to 1 + the loss: sums in float32 are taken in another order."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Differences:
    """Mean absolute differences of a token's loss under one attention."""

    loss: float
    """From the cross-entropy of the model's own logits, computed the same way."""
    alone: float
    """From the model's own attention."""
    beside: float
    """Of an example beside others, from alone."""
    depends: float
    """Change by what the other examples say, or what comes after."""
    explained: float
    """What rounding explains of `alone` and `beside`."""

    def problem(self, packed: bool) -> str | None:
        """What is wrong in one line, or None."""
        for name, value in (("loss", self.loss), ("alone", self.alone)):
            if not value <= self.explained:
                what = "the model's own logits" if name == "loss" else "the model alone"
                return f"losses differ by {value:.2g} from those of {what}; rounding explains {self.explained:.2g}"
        if not self.beside <= self.explained or self.depends > 0:
            where = "in its sequence" if packed else "in its micro-batch"
            return f"the losses of an example change by {max(self.beside, self.depends):.2g} with the others {where}"
        return None


@dataclass(frozen=True)
class SelfTest:
    """What the self-test has found."""

    attention: str
    """The implementation that is used."""
    given_masks: bool = False
    """Whether the model has to be given its masks: it makes them of nothing."""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """Those that would have been faster -> what is wrong with them."""
    differences: Differences | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for result.json."""
        return asdict(self)

    def line(self) -> str:
        """A line for the log."""
        found = self.differences
        shown = f"losses right to {max(found.loss, found.alone, found.beside):.1g}" if found else ""
        return f"self-test: {shown} with attention={self.attention}, in {self.seconds:.1f} s"


def choose_attention(loss: SupervisedLoss, packs: Sequence[Pack], config: AnyConfig, device: torch.device) -> SelfTest:
    """Test the base model on examples of `packs`, and give it the first attention that passes.

    All workers of a sharded base must call it together. Raises UserError if none passes, with what to set instead.
    """
    began, model = time.perf_counter(), loss.model
    dtype = next(model.parameters()).dtype
    wanted = _not_flat(model, attention.candidates(model, config.model, dtype, device))
    trial = _Trial(loss, _examples(packs, config, model), any(len(pack.segments) > 1 for pack in packs), device)
    failed: dict[str, str] = {}
    with _whole(loss, trial.batch(attention.own(model))):
        trial.measure_own()
        for name in wanted:
            problem, found = trial.run(name)
            if problem is None:
                _set(model, name)
                for other, why in failed.items():
                    logger.info(f"attention {name} instead of {other}: {why}")
                return SelfTest(name, loss.given_masks, failed, found, time.perf_counter() - began)
            failed[name] = problem
        free = attention.candidates(model, config.model.model_copy(update={"attention": "auto"}), dtype, device)
        instead = next((name for name in free if name not in failed and trial.run(name)[0] is None), None)
    raise UserError(_refusal(type(model).__name__, failed, trial, instead))


def _not_flat(model: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those for which examples are laid out apart, where the model's structure tells that they have to be."""
    why = why_apart(model)
    found = tuple(name for name in names if why is None or name not in FLAT_ATTENTION)
    if not found:
        raise UserError(
            f"model.attention={names[0]}: it lays all examples of a micro-batch out in one row, and"
            f" {type(model).__name__} {why}; set it to auto"
        )
    return found


def _refusal(family: str, failed: Mapping[str, str], trial: "_Trial", instead: str | None) -> str:
    name, why = list(failed.items())[-1]
    if instead is not None:
        return f"model.attention={name}: with {family}, {why}; set it to {instead}"
    if trial.only_beside and trial.packed:
        return f"data.packing: with {family}, {why}; set data.packing: false"
    if trial.only_beside:
        return f"train.micro_batch: with {family}, {why}; set train.micro_batch: 1"
    return f"model.name: {family} cannot be trained here: with attention {name}, {why}"


class _Trial:
    """The same examples under one attention after the other."""

    def __init__(self, loss: SupervisedLoss, examples: Sequence[Ids], packed: bool, device: torch.device) -> None:
        self.loss, self.packed, self.device = loss, packed, device
        self.examples = examples
        self.explained, self.own = 0.0, torch.empty(0)
        self.only_beside = True
        """Whether every failure so far was of examples beside others."""

    def batch(self, name: str, examples: Sequence[Ids] | None = None) -> Batch:
        """The examples as training lays them out."""
        chosen = self.examples if examples is None else examples
        groups = [chosen[:2], chosen[2:]] if self.packed else [[one] for one in chosen]
        return collate([_pack(group) for group in groups if group], name).to(self.device)

    def measure_own(self) -> None:
        """The losses of the second example by the model itself, and what rounding explains of a difference."""
        _set(self.loss.model, attention.own(self.loss.model))
        self.own = self._own_losses()
        with _rounded(self.loss.model):
            noise = self._own_losses()
        floor = FLOOR * (1 + float(self.own.mean()))
        margin = MARGIN_OF_EXPERTS if _routes(self.loss.model) else MARGIN
        self.explained = margin * float((noise - self.own).abs().mean()) + floor

    def run(self, name: str) -> tuple[str | None, Differences | None]:
        """What is wrong with an attention, or None; and what was measured. The model may need to be given masks."""
        self.loss.given_masks = False
        problem, found = self._try(name)
        if problem and (found is None or max(found.loss, found.alone) > found.explained):
            self.only_beside = False
        if problem is not None and found is not None and self.packed and name in ("sdpa", "eager"):
            self.loss.given_masks = True
            again, other = self._try(name)
            if again is None:
                return None, other
            self.loss.given_masks = False
        return problem, found

    def _try(self, name: str) -> tuple[str | None, Differences | None]:
        try:
            _set(self.loss.model, name)
            found = self._differences(name)
        except torch.OutOfMemoryError:
            raise
        except (UserError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, IndexError) as error:
            why = first_line(error)
            if isinstance(error, UserError):
                return why.partition(": ")[2].partition(";")[0], None
            return f"its forward fails: {type(error).__name__}: {why}", None
        return found.problem(self.packed), found

    def _differences(self, name: str) -> Differences:
        first, second, third = self.examples
        together = self.batch(name)
        losses = self.loss.each(together)
        by_head = self._by_model(together)
        alone = self.loss.each(self.batch(name, [second]))
        # What the second example must not see: other words before it in another order, and its own last token.
        changed = self.loss.each(self.batch(name, [first[::-1], (*second[:-1], second[0]), third[::-1]]))
        part = slice(len(first) - 1, len(first) + len(second) - 2)
        seen = (losses[part][:-1] - changed[part][:-1]).abs()
        depends = float(seen.mean()) if len(seen) else 0.0
        if _routes(self.loss.model) and depends <= self.explained:
            depends = 0.0  # an expert's rows are a product together: other rows, other roundings
        return Differences(
            loss=_mean(losses - by_head),
            alone=_mean(alone - self.own),
            beside=_mean(losses[part] - alone),
            depends=depends,
            explained=self.explained,
        )

    @torch.no_grad()
    def _by_model(self, batch: Batch) -> Tensor:
        """The losses of a batch by the logits that the model's own forward gives for it."""
        model: Any = self.loss.model
        logits = model(**self.loss.taken(batch), use_cache=False).logits
        rows = logits.reshape(-1, logits.shape[-1])[batch.predicts]
        return F.cross_entropy(rows.float(), batch.labels, reduction="none")

    @torch.no_grad()
    def _own_losses(self) -> Tensor:
        model: Any = self.loss.model
        ids = torch.tensor([self.examples[1]], device=self.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        return F.cross_entropy(logits.float(), ids[0, 1:], reduction="none")


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
    try:
        _check_adapters(loss, adapted, packs, name, device, new)
    except NotImplementedError as error:  # of experts' weights that are used in a way that is not known here
        raise UserError(f"adapter.targets: {first_line(error)}; leave the experts out of adapter.targets") from None


def _check_adapters(
    loss: SupervisedLoss,
    adapted: Mapping[str, AdaptedWeight],
    packs: Sequence[Pack],
    name: str,
    device: torch.device,
    new: bool,
) -> None:
    examples = list(_rows(packs, SHORT))[:3]
    batch = collate([_pack([ids]) for ids in examples], name).to(device)
    with _whole(loss, batch):
        if new:
            losses = loss.each(batch)
            with bare(loss.model):
                base = loss.each(batch)
            if not torch.equal(losses, base):
                raise UserError(
                    f"model.name: {type(loss.model).__name__} with untrained adapters differs by"
                    f" {_mean(losses - base):.2g} from the base: one of adapter.targets is not a plain linear layer"
                )
    total: Tensor = loss(batch)
    total.backward()
    without = [layer for layer, module in adapted.items() if not any(map(_has_gradient, (module.da, module.db)))]
    for module in adapted.values():
        for parameter in (module.da, module.db):
            if parameter.grad is not None:
                parameter.grad.zero_()
    if without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise UserError(
            f"adapter.targets: {', '.join(without[:3])}{more} take no part in what the model makes of text: no gradient"
            " reaches them; leave them out"
        )


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool((parameter.grad != 0).any())


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


@contextmanager
def _whole(loss: Any, batch: Batch) -> Iterator[None]:
    """Of a sharded base, embeddings and head are gathered; its blocks gather themselves."""
    if not hasattr(loss, "unshard"):
        yield
        return
    with torch.no_grad():
        loss(batch)  # FSDP must meet its root first
    loss.unshard()
    try:
        yield
    finally:
        loss.reshard()


@contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """Each block's output is moved by up to half a unit in its last place."""
    generator = torch.Generator().manual_seed(0)

    def moved(_module: nn.Module, _inputs: object, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        move = torch.rand(hidden.shape, generator=generator).to(hidden.device) - 0.5
        found = (hidden.float() * (1 + torch.finfo(hidden.dtype).eps * move)).to(hidden.dtype)
        return (found, *output[1:]) if isinstance(output, tuple) else found

    handles = [layer.register_forward_hook(moved) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _set(model: Any, name: str) -> None:
    model.set_attn_implementation(name)


def _mean(difference: Tensor) -> float:
    """Infinite where something is not finite: NaN compares with nothing."""
    value = float(difference.abs().mean())
    return value if np.isfinite(value) else float("inf")


def _routes(model: nn.Module) -> bool:
    return any(name.endswith("experts") or hasattr(module, "num_experts") for name, module in model.named_modules())


def _examples(packs: Sequence[Pack], config: AnyConfig, model: Any) -> tuple[Ids, Ids, Ids]:
    """Three examples, cut; the second is as long as one can be where the model attends within a window."""
    rows = list(_rows(packs, SHORT))
    second = rows[1]
    if _limits(model.config.get_text_config(), config.data.max_length):
        second = max(_rows(packs, config.data.max_length), key=len)
    return rows[0], second, rows[2]


def _rows(packs: Sequence[Pack], longest: int) -> Iterator[Ids]:
    """The examples of some sequences, cut; the same again if they are few, so that there are three."""
    found = [tuple(ids.tolist()) for pack in packs for ids in np.split(pack.input_ids, np.cumsum(pack.segments)[:-1])]
    long = [ids[:longest] for ids in found if len(ids) > 2]
    return iter([*long, *[ids[::-1] for ids in long], *long] if len(long) < 3 else long)


def _limits(shape: Any, length: int) -> bool:
    """Whether something in a model's config is a window or chunk of attention shorter than a sequence."""
    named = {name: value for name, value in shape.to_dict().items() if "window" in name or "chunk" in name}
    return any(type(value) is int and 0 < value < length for value in named.values())


def _pack(examples: Sequence[Ids]) -> Pack:
    """A sequence in which every token but the first of an example is supervised."""
    ids = np.concatenate([np.array(example, dtype=np.int32) for example in examples])
    supervised = np.ones(len(ids), dtype=bool)
    supervised[np.cumsum([0, *map(len, examples[:-1])])] = False
    return Pack(ids, supervised, tuple(map(len, examples)))
