"""Self-test of a model before the first step: does training compute what the model computes, whatever its family?

On a few tokens of three examples, on the worker, with the model where it will be trained:

- **loss**: the training loss of each token is the cross-entropy of the model's own logits;
- **alone**: the losses of an example are those of the model in its own attention, with nothing beside it;
- **beside others**: an example's losses are the same in a sequence or a micro-batch with others, and not one bit of
  them depends on what the others say, or on what comes after;

The first attention (model/attention.py) that passes is used. Losses that may differ by rounding are seen against
what rounding explains, which is measured: the output of every block is moved at random by up to half a unit in its
last place. `check_adapters` tests adapters.
"""

import logging
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.adapter.layer import AdaptedExperts, AdaptedLinear, AdaptedWeight, TakenWeight
from olora_ray.common.errors import UserError, first_line
from olora_ray.config.schema import AnyConfig
from olora_ray.model import attention
from olora_ray.model.packing import check_lengths, shares_sequences, why_not_in_one_row
from olora_ray.tokens.collate import FLAT_ATTENTION, Batch, Pack, collate
from olora_ray.train import parallel
from olora_ray.train.base_files import decoder_layers
from olora_ray.train.loss import Differences, SelfTest, SupervisedLoss
from olora_ray.train.parallel import begin_at_root

logger = logging.getLogger(__name__)

# A few short examples of a token store's sequences, on which a model is tried.


SHORT = 24
"""Tokens of an example: rounding and leaks show in a few."""

Ids = tuple[int, ...]


def three_examples(packs: Sequence[Pack], config: AnyConfig, model: Any) -> tuple[Ids, Ids, Ids]:
    """Three examples, cut; the second goes beyond the windows of a model, as far as a sequence can."""
    rows = list(examples_of(packs, SHORT))
    second = rows[1]
    if limits := _limits(model.config.get_text_config(), config.data.max_length):
        # The longest example, again and again to just this length: those that come first may be short, and others not.
        length = min(config.data.max_length, max(limits) + SHORT)
        longest = max(examples_of(packs, length), key=len)
        second = (longest * -(-length // len(longest)))[:length]
    return rows[0], second, rows[2]


def examples_of(packs: Sequence[Pack], longest: int) -> Iterator[Ids]:
    """The examples of some sequences, cut; the same again if they are few, so that there are three."""
    found = [tuple(ids.tolist()) for pack in packs for ids in np.split(pack.input_ids, np.cumsum(pack.segments)[:-1])]
    long = [ids[:longest] for ids in found if len(ids) > 2]
    long = long or [(3 * tuple(token for ids in found for token in ids))[:longest]]  # all together make one
    return iter([*long, *[ids[::-1] for ids in long], *long] if len(long) < 3 else long)


def _limits(shape: Any, length: int) -> list[int]:
    """The windows and chunks of attention in a model's config that are shorter than a sequence."""
    named = [value for name, value in shape.to_dict().items() if "window" in name or "chunk" in name]
    return [value for value in named if type(value) is int and 0 < value < length]


def one_pack(examples: Sequence[Ids]) -> Pack:
    """A sequence in which every token but the first of an example is supervised."""
    ids = np.concatenate([np.array(example, dtype=np.int32) for example in examples])
    supervised = np.ones(len(ids), dtype=bool)
    supervised[np.cumsum([0, *map(len, examples[:-1])])] = False
    return Pack(ids, supervised, tuple(map(len, examples)))


MARGIN, MARGIN_OF_EXPERTS = 10.0, 40.0
"""A mean difference may be this many times what rounding explains (observed: up to 4 times, and 10 times where
rounding decides which expert a token goes to)."""


def choose_attention(loss: SupervisedLoss, packs: Sequence[Pack], config: AnyConfig, device: torch.device) -> SelfTest:
    """Test the base model on examples of `packs`, and give it the first attention that passes.

    All workers of a sharded base must call it together. Raises UserError if none passes, with what to set instead.
    """
    model: Any = loss.model
    began = time.perf_counter()
    dtype = next(model.parameters()).dtype
    check_lengths(model, config)
    tokens = config.train.micro_batch * config.data.max_length
    wanted = _not_flat(model, attention.candidates(model, config.model, dtype, device), tokens)
    # Each of the few sequences that are looked at may have one example, and others have several all the same.
    packed = shares_sequences(model, config) or any(len(pack.segments) > 1 for pack in packs)
    trial = _Trial(loss, three_examples(packs, config, model), packed, device)
    failed: dict[str, str] = {}
    own = attention.own(model)
    model.set_attn_implementation(own)  # the first to run: with one that fails, a sharded base would fail with it
    begin_at_root(loss)
    trial.measure_own()
    for name in wanted:
        problem, found = trial.run(name)
        if problem is None:
            model.set_attn_implementation(name)
            for other, why in failed.items():
                logger.info(f"attention {name} instead of {other}: {why}")
            return SelfTest(name, loss.given_masks, failed, found, time.perf_counter() - began)
        failed[name] = problem
    text = _refusal(type(model).__name__, failed, trial)
    free = attention.candidates(model, config.model.model_copy(update={"attention": "auto"}), dtype, device)
    instead = next((name for name in free if name not in failed and trial.run(name)[0] is None), None)
    if instead is not None:
        text = f"model.attention={wanted[-1]}: with {type(model).__name__}, {failed[wanted[-1]]}; set it to {instead}"
    raise UserError(text)


def require_layout(loss: SupervisedLoss, config: AnyConfig) -> None:
    """Raise UserError where the attention that has passed with another adapter's settings does not do for these.

    Trials of a search may share a base, and differ in how many sequences go through it at once.
    """
    model: Any = loss.model
    check_lengths(model, config)
    why = why_not_in_one_row(model, config.train.micro_batch * config.data.max_length)
    if loss.tested is not None and loss.tested.attention in FLAT_ATTENTION and why:
        raise UserError(
            f"train.micro_batch={config.train.micro_batch}: other trials on this copy of the base lay all examples of a"
            f" micro-batch out in one row, and {type(model).__name__} {why}; set trials_per_worker: 1 or"
            " model.attention: sdpa"
        )


def _not_flat(model: Any, names: tuple[str, ...], tokens: int) -> tuple[str, ...]:
    """The attentions that lay examples out apart, if the model's structure needs that; else all."""
    why = why_not_in_one_row(model, tokens)
    found = tuple(name for name in names if why is None or name not in FLAT_ATTENTION)
    if not found:
        raise UserError(
            f"model.attention={names[0]}: it lays all examples of a micro-batch out in one row, and"
            f" {type(model).__name__} {why}; set it to auto"
        )
    return found


def _refusal(family: str, failed: Mapping[str, str], trial: "_Trial") -> str:
    name, why = list(failed.items())[-1]
    if trial.only_beside and trial.packed:
        return f"data.packing: with {family}, {why}; set data.packing: false"
    if trial.only_beside:
        return f"train.micro_batch: with {family}, {why}; set train.micro_batch: 1"
    return f"model.name: {family} cannot be trained here: with attention {name}, {why}"


class _Trial:
    """The same examples under one attention after the other."""

    def __init__(self, loss: SupervisedLoss, examples: Sequence[Ids], packed: bool, device: torch.device) -> None:
        self.loss, self.packed, self.device = loss, packed, device
        self.model: Any = loss.model
        self.examples = examples
        self.explained, self.own = 0.0, torch.empty(0)
        self.only_beside = False
        """True if the last attention was wrong only for examples beside others."""

    def batch(self, name: str, examples: Sequence[Ids] | None = None) -> Batch:
        """The examples as training lays them out."""
        chosen = self.examples if examples is None else examples
        groups = [chosen[:2], chosen[2:]] if self.packed else [[one] for one in chosen]
        return collate([one_pack(group) for group in groups if group], name).to(self.device)

    def measure_own(self) -> None:
        """The losses of the second example by the model itself, and what rounding explains of a difference."""
        self.model.set_attn_implementation(attention.own(self.model))
        self.own = self._own_losses()
        with _rounded(self.model):
            noise = self._own_losses()
        floor = 2.0**-19 * (1 + float(self.own.mean()))  # sums in float32 are taken in another order
        margin = MARGIN_OF_EXPERTS if _routes(self.model) else MARGIN
        self.explained = margin * float((noise - self.own).abs().mean()) + floor

    def run(self, name: str) -> tuple[str | None, Differences | None]:
        """Return the problem of an attention, or None, and the differences. The model may need masks as inputs."""
        takes_masks, routes = self.packed and name in ("sdpa", "eager"), _routes(self.model)
        # Where rounding decides on experts it explains so much that a leak may be less: these masks leave none.
        if takes_masks and routes and (given := self._with_masks(name)) is not None:
            return None, given
        self.loss.given_masks = False
        problem, found = self._try(name)
        self.only_beside = found is not None and max(found.loss, found.alone) <= found.explained
        if problem is None or found is None or not takes_masks or routes:
            return problem, found
        given = self._with_masks(name)
        return (problem, found) if given is None else (None, given)

    def _with_masks(self, name: str) -> Differences | None:
        """Give the model masks of the positions, from now on if that is right; return the differences, or None."""
        self.loss.given_masks = True
        problem, found = self._try(name)
        self.loss.given_masks = problem is None
        return found if problem is None else None

    def _try(self, name: str) -> tuple[str | None, Differences | None]:
        try:
            self.model.set_attn_implementation(name)
            found = self._differences(name)
        except torch.OutOfMemoryError:
            raise
        except (UserError, ImportError, ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
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
        if _routes(self.model) and depends <= self.explained:
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
        logits = self.model(**self.loss.taken(batch), use_cache=False).logits
        return self._losses(logits.reshape(-1, logits.shape[-1]), batch.predicts, batch.labels)

    @torch.no_grad()
    def _own_losses(self) -> Tensor:
        ids = torch.tensor([self.examples[1]], device=self.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0]
        return self._losses(logits, torch.arange(len(logits) - 1, device=self.device), ids[0, 1:])

    def _losses(self, logits: Tensor, predicts: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of some rows of logits, a chunk at a time: all at once need several times their memory."""
        size = self.loss.chunk(logits.device)
        parts = zip(predicts.split(size), labels.split(size), strict=True)
        return torch.cat([F.cross_entropy(logits[rows].float(), target, reduction="none") for rows, target in parts])


@contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """Each block's output is moved by up to half a unit in its last place."""
    generator = torch.Generator().manual_seed(0)

    def moved(_module: nn.Module, _inputs: object, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple | list) else output
        move = torch.rand(hidden.shape, generator=generator).to(hidden.device) - 0.5
        found = (hidden.float() * (1 + torch.finfo(hidden.dtype).eps * move)).to(hidden.dtype)
        return (found, *output[1:]) if isinstance(output, tuple | list) else found

    handles = [layer.register_forward_hook(moved) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean(difference: Tensor) -> float:
    """Infinite where something is not finite: NaN compares with nothing."""
    value = float(difference.abs().mean())
    return value if np.isfinite(value) else float("inf")


def _routes(model: nn.Module) -> bool:
    return any(name.endswith("experts") or hasattr(module, "num_experts") for name, module in model.named_modules())


# Test of a model's adapters before the first step: they change nothing yet, and each receives a gradient.


_EXPERT = re.compile(r"([^.]*expert[^.]*)\.(?:expert_)?\d+(?=\.)")
"""The number of an expert that is a module of its own, as in `mlp.experts.3.up_proj`."""


def check_adapters(
    loss: SupervisedLoss,
    adapted: Mapping[str, AdaptedWeight],
    packs: Sequence[Pack],
    name: str,
    device: torch.device,
    new: bool,
    named: bool = True,
) -> list[str]:
    """Return the adapters that no gradient reaches, or raise UserError if these were `named` by the user.

    Raises UserError, too, if untrained (`new`) adapters change a bit of a loss. `name` is the attention. The gradients
    are left at zero.
    """
    examples = list(examples_of(packs, SHORT))[:3]
    batch = collate([one_pack([ids]) for ids in examples], name).to(device)
    try:
        without = _try(loss, adapted, batch, new)
    except TakenWeight as error:
        raise UserError(f"adapter.targets: {first_line(error)}; leave it out of adapter.targets") from None
    if without and named:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise UserError(
            f"adapter.targets: {', '.join(without[:3])}{more} take no part in what the model makes of text: no gradient"
            " reaches them; leave them out"
        )
    return without


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
    gradients, reached = _gradients(loss, adapted, batch)
    if loss.recompute:
        with parallel.switched(loss, on=False):
            other, _ = _gradients(loss, adapted, batch)
        parallel.check_same(
            type(loss.model).__name__,
            *([part for pair in parts.values() for part in pair] for parts in (gradients, other)),
        )
    return _missed(gradients, reached)


def _missed(adapted: Collection[str], reached: Collection[str]) -> list[str]:
    """The adapters that no gradient has reached; no expert beside which another was: few tokens go to some alone."""
    kinds = {_EXPERT.sub(r"\1.*", layer) for layer in reached}
    return [layer for layer in adapted if layer not in reached and _EXPERT.sub(r"\1.*", layer) not in kinds]


def _gradients(
    loss: SupervisedLoss, adapted: Mapping[str, AdaptedWeight], batch: Batch
) -> tuple[dict[str, list[Tensor]], set[str]]:
    """Return the gradients of dA and dB of each adapter, and the adapters that one reaches; set them to zero.

    A gradient of zeros has reached its adapter: a block that begins as zeros is trained all the same.
    """
    reached: set[str] = set()
    handles = [
        part.register_hook(lambda _, layer=layer: reached.add(layer))
        for layer, module in adapted.items()
        for part in (module.da, module.db)
    ]
    total: Tensor = loss(batch)
    total.backward()
    for handle in handles:
        handle.remove()
    found: dict[str, list[Tensor]] = {}
    for layer, module in adapted.items():
        parts = [part.grad for part in (module.da, module.db) if part.grad is not None]
        found[layer] = [part.clone() for part in parts]
        for part in parts:
            part.zero_()
    return found, reached


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
