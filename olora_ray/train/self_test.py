"""Self-test of a model before the first step: does training compute what the model computes, whatever its family?

On three examples, of which one is long, on the worker, with the model where it will be trained:

- **outputs**: each part of a block, given the same input, gives the same output as in the model's own attention with
  the example alone; nothing that came before amplifies a difference, so that rounding explains very little;
- **loss**: the training loss of each token is the cross-entropy of the model's own logits;
- **beside others**: not one bit of an example depends on what the others say, or on what comes after;
- **gradients**: those of all adapters are what torch makes of the model's own attention and logits.

The first attention (model/attention.py) that passes is used. `check_adapters` tests adapters.
"""

import inspect
import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
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
from olora_ray.tokens.collate import FLAT_ATTENTION, collate
from olora_ray.tokens.plan import Pack
from olora_ray.train import parallel
from olora_ray.train.base_files import decoder_layers
from olora_ray.train.loss import Differences, LightRMSNorm, SelfTest, SupervisedLoss
from olora_ray.train.parallel import begin_at_root

logger = logging.getLogger(__name__)

# Examples of a token store's sequences, on which a model is tried.


SHORT = 24
"""Tokens of a short example."""
LONG = 512
"""Tokens of the long one: as far as a leak is looked for."""

Ids = tuple[int, ...]


def three_examples(packs: Sequence[Pack], config: AnyConfig, model: Any) -> tuple[Ids, Ids, Ids]:
    """Return three examples, cut; the second goes beyond the windows of a model, as far as a sequence can.

    It is made of all examples, one after the other, again and again.
    """
    most = config.data.length()
    short = max(3, min(SHORT, most // 4))
    rows = list(examples_of(packs, short))
    windows = _limits(model.config.get_text_config(), most)
    # Some models see the place in a sequence: the three are as long as one, unless a window ends later.
    length = min(most, max(windows) + SHORT) if windows else min(LONG, max(short, most - 2 * short))
    text = tuple(token for pack in packs for token in pack.input_ids.tolist())
    return rows[0], (text * -(-length // len(text)))[:length], rows[2]


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
    """A sequence in which the last tokens of an example are supervised, never its first."""
    ids = np.concatenate([np.array(example, dtype=np.int32) for example in examples])
    places = [np.arange(len(example)) for example in examples]
    supervised = np.concatenate([(place > 0) & (place >= len(place) - SHORT) for place in places])
    return Pack(ids, supervised, tuple(map(len, examples)))


# Parts of a model: their outputs in one run, and in another run on the same inputs.


TOLERANCE = {torch.float32: 2.0**-13, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""How far an output or a gradient may be off, relative. Rounding was seen to take a third of it in bfloat16; a softmax
scale that is 10 % off in a trained model takes four times as much."""
OF_ONE = 8
"""A single adapter's gradient may be so many times as far off: much cancels out in that of some layer's keys. A mistake
is in all layers of a kind."""


@dataclass
class _Output:
    """The output of a part for one example: tokens x features."""

    value: Tensor
    slope: Tensor | None = None
    """The gradient of the loss by it, after a backward pass."""


Outputs = Mapping[tuple[str, int], list[_Output]]
"""(name of a part, number in what it returns) -> its outputs in the order of its calls."""


@contextmanager
def _parts(
    model: nn.Module, shape: torch.Size, rows: Sequence[Tensor], given: Sequence[Outputs] = ()
) -> Iterator[list[Outputs]]:
    """Note the outputs of a model's parts for each example; what comes next may be given others in their place.

    `rows` are the places of the examples among the tokens of a batch (`shape`), whatever else is in it. Parts are the
    blocks, what these are made of, and what chooses experts, of which all is taken: where rounding decides on an
    expert, the choice is the same one then.
    """
    found: list[dict[tuple[str, int], list[_Output]]] = [defaultdict(list) for _ in rows]

    def exchange(key: tuple[str, int], output: Any) -> Any:
        if not isinstance(output, Tensor) or (axis := _axis(output, shape)) is None:
            return output
        values, slopes = _by_token(output.detach(), axis).clone(), None
        for number, (places, noted) in enumerate(zip(rows, (each[key] for each in found), strict=True)):
            noted.append(_Output(values[places]))
            if given:
                other = given[number][key][len(noted) - 1]
                values[places] = other.value[: len(places)]
                if other.slope is not None:
                    slopes = torch.zeros_like(values) if slopes is None else slopes
                    slopes[places] = other.slope
            elif output.requires_grad:
                output.register_hook(partial(_note, noted[-1], axis, places))
        parts = [None if part is None else _back(part, axis, shape) for part in (values, slopes)]
        exchanged: Any = _Exchanged  # torch leaves `apply` untyped
        return exchanged.apply(output, *parts) if given else output

    def hook(name: str, whole: bool, _module: nn.Module, _inputs: object, output: Any) -> Any:
        if type(output) not in (tuple, list):
            return exchange((name, 0), output)
        return type(output)(exchange((name, n), part) if whole or n == 0 else part for n, part in enumerate(output))

    names = {part: name for name, part in model.named_modules()}
    inside = {part: name for block in decoder_layers(model) for name, part in block.named_modules()}
    choose = {part for part, name in inside.items() if {"gate", "router"} & set(name.split("."))}
    # The same input has the same bits after a norm.
    wanted = [part for part, name in inside.items() if "." not in name and "Norm" not in type(part).__name__]
    hooks = [
        part.register_forward_hook(partial(hook, names[part], part in choose))
        for part in dict.fromkeys([*wanted, *choose])
    ]
    try:
        yield list(found)
    finally:
        for handle in hooks:
            handle.remove()


def _axis(output: Tensor, shape: torch.Size) -> int | None:
    """The axis of a batch's rows, before that of their tokens; -1 if the first axis is both; None: neither."""
    axes = [axis for axis in range(output.dim()) if output.shape[axis : axis + 2] == shape]
    return axes[0] if axes else -1 if output.shape[:1] == (shape.numel(),) else None


def _by_token(output: Tensor, axis: int) -> Tensor:
    return output if axis < 0 else output.movedim((axis, axis + 1), (0, 1)).flatten(0, 1)


def _back(flat: Tensor, axis: int, shape: torch.Size) -> Tensor:
    return flat if axis < 0 else flat.unflatten(0, tuple(shape)).movedim((0, 1), (axis, axis + 1))


def _note(noted: _Output, axis: int, places: Tensor, slope: Tensor) -> None:
    noted.slope = _by_token(slope, axis)[places]


class _Exchanged(torch.autograd.Function):
    """Other values in the place of an output, and another gradient in the place of theirs, if there is one."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, values: Tensor, slopes: Tensor | None) -> Tensor:
        ctx.slopes = slopes
        return values.clone()  # no view: some families add to it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] if ctx.slopes is None else ctx.slopes, None, None


def _alone(loss: SupervisedLoss, example: Ids, device: torch.device, backward: bool = False) -> tuple[Outputs, Tensor]:
    """Return what the parts of the model give for an example alone, and the losses of its end by the model's logits."""
    model: Any = loss.model
    ids = torch.tensor([example], device=device)
    last = {"logits_to_keep": SHORT + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.set_grad_enabled(backward), _parts(model, ids.shape, _places([[example]], ids)) as (parts,):
        logits = model(input_ids=ids, use_cache=False, **last).logits[0, -SHORT - 1 : -1]
        losses = F.cross_entropy(logits.float(), ids[0, 1:][-SHORT:], reduction="none")
    if backward:
        losses.sum().backward()
    return parts, losses.detach()


def _places(groups: Sequence[Sequence[Ids]], ids: Tensor) -> list[Tensor]:
    """The tokens of each example in a batch of these rows, or of one row in which they follow each other."""
    found, place = [], 0
    for number, group in enumerate(groups):
        place = place if len(ids) == 1 else number * ids.shape[1]
        for example in group:
            found.append(torch.arange(place, place + len(example), device=ids.device))
            place += len(example)
    return found


def _worst(found: Outputs, wanted: Outputs) -> tuple[float, str]:
    """The largest relative difference of a part's output, and the name of that part."""
    off = [
        (_off(one.value, other.value[: len(one.value)]), key[0])
        for key, outputs in wanted.items()
        for one, other in zip(found[key], outputs, strict=True)
        if other.value.is_floating_point()
    ]
    return max(((float(value.nan_to_num(math.inf)), name) for value, name in off), default=(0.0, ""))


def _off(found: Tensor, wanted: Tensor) -> Tensor:
    """The relative difference of the worst tokens that follow each other, root mean square; or half of the worst one's.

    At the end of a window it is one token or another that looks at the last one.
    """
    one, other = (part.float().reshape(len(part), -1) for part in (found, wanted))
    size = other.norm(dim=1)
    off = (one - other).norm(dim=1) / (size + size.median() / 8 + torch.finfo(torch.float32).tiny)
    pieces = [part.square().mean().sqrt() for part in off.tensor_split(max(1, len(off) // SHORT))]
    return torch.stack([*pieces, off.max() / 2]).max()


# Choice of a base's attention.


def choose_attention(loss: SupervisedLoss, packs: Sequence[Pack], config: AnyConfig, device: torch.device) -> SelfTest:
    """Test the base model on examples of `packs`, and give it the first attention that passes.

    All workers of a sharded base must call it together. Raises UserError if none passes, with what to set instead.
    """
    model: Any = loss.model
    began = time.perf_counter()
    dtype = next(model.parameters()).dtype
    check_lengths(model, config)
    tokens = config.train.micro_batch * config.data.length()
    wanted = _not_flat(model, attention.candidates(model, config.model, dtype, device), tokens)
    # Each of the few sequences that are looked at may have one example, and others have several all the same.
    packed = shares_sequences(model, config) or any(len(pack.segments) > 1 for pack in packs)
    examples = three_examples(packs, config, model)
    beside = packed or config.train.micro_batch > 1
    trial = _Trial(loss, examples if beside else examples[1:2], packed, device)
    failed = attention.left_out(model, config.model, dtype, device)
    for name in wanted:
        problem, found = trial.run(name)
        if problem is None:
            model.set_attn_implementation(name)
            for other, why in failed.items():
                logger.info(f"attention {name} instead of {other}: {why}")
            return SelfTest(name, loss.given_masks, failed, found, seconds=time.perf_counter() - began)
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
    why = why_not_in_one_row(model, config.train.micro_batch * config.data.length())
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
    """The same examples under one attention after the other; the long one is in the middle."""

    def __init__(self, loss: SupervisedLoss, examples: Sequence[Ids], packed: bool, device: torch.device) -> None:
        """Run the model in its own attention, on each example alone."""
        model: Any = loss.model
        self.loss, self.model, self.packed, self.device = loss, model, packed, device
        self.only_beside = False
        """True if the last attention was wrong only for examples beside others."""
        model.set_attn_implementation(attention.own(model))
        begin_at_root(loss)  # before an attention that fails, with which a sharded base would fail
        self.examples = [(ids, *_alone(loss, ids, device)) for ids in examples]
        self.routing = {name for name, _ in self.examples[0][1] if _routes(model.get_submodule(name))}
        """Parts in which the rows of an expert are one product: with other rows, their rounding is another."""

    def run(self, name: str) -> tuple[str | None, Differences | None]:
        """Return the problem of an attention, or None, and the differences. The model may need masks as inputs."""
        self.loss.given_masks = False
        problem, found = self._try(name)
        if found is not None and problem is not None and self.packed and name in ("sdpa", "eager"):
            beside, self.loss.given_masks = self.only_beside, True
            other, given = self._try(name)
            if other is None:
                return None, given
            self.only_beside, self.loss.given_masks = beside, False
        return problem, found

    def _try(self, name: str) -> tuple[str | None, Differences | None]:
        self.only_beside = False
        try:
            self.model.set_attn_implementation(name)
            found = self._differences(name, self.examples)
            if found.problem() is not None and len(self.examples) > 1:
                alone = self._differences(name, self.examples[1:2])
                self.only_beside = alone.problem() is None
                found = found if self.only_beside else alone
        except torch.OutOfMemoryError:
            raise
        except (UserError, ImportError, ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
            why = first_line(error)
            if isinstance(error, UserError):
                return why.partition(": ")[2].partition(";")[0], None
            return f"its forward fails: {type(error).__name__}: {why}", None
        where = "in its sequence" if self.packed else "in its micro-batch"
        return found.problem(where if self.only_beside else None), found

    def _differences(self, name: str, examples: Sequence[tuple[Ids, Outputs, Tensor]]) -> Differences:
        texts, given, own = zip(*examples, strict=True)
        found, losses = self._run(name, texts, dict(enumerate(given)))
        output, part = max(map(_worst, found, given))
        # What the long example must not see: other words before it, in another order, and its own last token.
        long = len(texts) // 2
        changed = [(*ids[:-1], ids[0]) if number == long else ids[::-1] for number, ids in enumerate(texts)]
        (seen,), _ = self._run(name, changed, {long: given[long]}, but_last=True)
        change, of = _worst(seen, {key: value for key, value in found[long].items() if key[0] not in self.routing})
        wanted = torch.cat(own)
        return Differences(
            output=output,
            part=part,
            loss=float((losses - wanted).abs().mean() / (1 + wanted.mean())),
            change=change,
            changed=of,
            tolerance=TOLERANCE[self.model.dtype],
        )

    def _run(
        self, name: str, texts: Sequence[Ids], given: Mapping[int, Outputs], but_last: bool = False
    ) -> tuple[list[Outputs], Tensor]:
        """Return what the parts make of what some texts are given, and all losses, laid out as in training."""
        groups = [texts[:2], texts[2:]] if self.packed else [[one] for one in texts]
        batch = collate([one_pack(group) for group in groups if group], name).to(self.device)
        ids: Any = batch.inputs["input_ids"]
        places = _places(groups, ids)
        rows = [places[number][: -1 if but_last else None] for number in given]
        with _parts(self.model, ids.shape, rows, list(given.values())) as found:
            return found, self.loss.each(batch)


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
) -> tuple[list[str], float]:
    """Return the adapters that no gradient reaches, and the largest relative difference of another's gradient.

    Raises UserError if an adapter that the user has `named` is not reached, if a gradient is not the right one, and if
    untrained (`new`) adapters change a bit of a loss. `name` is the attention. All gradients are left at zero.
    """
    try:
        without, off = _try(loss, adapted, list(examples_of(packs, SHORT))[:3], name, new)
    except TakenWeight as error:
        raise UserError(f"adapter.targets: {first_line(error)}; leave it out of adapter.targets") from None
    if without and named:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise UserError(
            f"adapter.targets: {', '.join(without[:3])}{more} take no part in what the model makes of text: no gradient"
            " reaches them; leave them out"
        )
    return without, off


def _try(
    loss: SupervisedLoss, adapted: Mapping[str, AdaptedWeight], examples: Sequence[Ids], name: str, new: bool
) -> tuple[list[str], float]:
    """The adapters that no gradient reaches, and the largest difference of a gradient; raises UserError."""
    begin_at_root(loss)
    model: Any = loss.model
    device = next(iter(adapted.values())).da.device
    batch = collate([one_pack([ids]) for ids in examples], name).to(device)
    if new:
        losses = loss.each(batch)
        with bare(model):
            base = loss.each(batch)
        if not torch.equal(losses, base):
            off = float((losses - base).abs().mean())
            raise UserError(
                f"model.name: {type(model).__name__} with untrained adapters differs by {off:.2g} from the"
                " base: one of adapter.targets is not a plain linear layer"
            )
    if loss.recompute:
        loss(batch).backward()
        with_it = _gradients(adapted)
        with parallel.switched(loss, on=False):
            loss(batch).backward()
        parallel.check_same(type(model).__name__, list(with_it.values()), list(_gradients(adapted).values()))
    with parallel.switched(loss, on=False):
        model.set_attn_implementation(attention.own(model))
        with _plain(model):
            given = [_alone(loss, ids, device, backward=True)[0] for ids in examples]
        wanted = _gradients(adapted)
        model.set_attn_implementation(name)
        ids: Any = batch.inputs["input_ids"]
        with _parts(model, ids.shape, _places([[one] for one in examples], ids), given):
            total: Tensor = loss(batch)
        with _reached(adapted) as reached:
            total.backward()
    gradients = _gradients(adapted)
    without = _missed(gradients, reached)
    kinds: dict[str, list[str]] = defaultdict(list)
    for layer in gradients.keys() - without:
        kinds[re.sub(r"\d+", "*", layer)].append(layer)
    differences = {kind: _relative(gradients, wanted, layers) for kind, layers in kinds.items()}
    differences |= {layer: _relative(gradients, wanted, [layer]) / OF_ONE for layer in gradients.keys() - without}
    worst, size = max(differences.items(), key=itemgetter(1), default=("", 0.0))
    if not size <= TOLERANCE[model.dtype]:
        own = attention.own(model)
        raise UserError(
            f"model.name: {type(model).__name__}: with attention {name}, the gradient of {worst} differs by"
            f" {size:.2g} of its size from that in the model's own attention, more than rounding explains;"
            + (" it cannot be trained here" if name == own else f" set model.attention: {own}")
        )
    return without, size


@contextmanager
def _reached(adapted: Mapping[str, AdaptedWeight]) -> Iterator[set[str]]:
    """Collect the adapters that a gradient reaches, one of zeros too: a block that begins as zeros is trained."""
    found: set[str] = set()
    hooks = [
        part.register_hook(lambda _, layer=layer: found.add(layer))
        for layer, module in adapted.items()
        for part in (module.da, module.db)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _relative(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], layers: Sequence[str]) -> float:
    """The difference of the gradients of some adapters; infinite where one is not finite."""
    one, other = (torch.cat([parts[layer] for layer in layers]) for parts in (found, wanted))
    return float(((one - other).norm() / other.norm().clamp(min=1e-30)).nan_to_num(math.inf))


def _missed(adapted: Collection[str], reached: Collection[str]) -> list[str]:
    """The adapters that no gradient has reached; no expert beside which another was: few tokens go to some alone."""
    kinds = {_EXPERT.sub(r"\1.*", layer) for layer in reached}
    return [layer for layer in adapted if layer not in reached and _EXPERT.sub(r"\1.*", layer) not in kinds]


def _gradients(adapted: Mapping[str, AdaptedWeight]) -> dict[str, Tensor]:
    """Return the gradients of dA and dB of each adapter, in one vector, and set them to zero."""
    found = {}
    for layer, module in adapted.items():
        parts = [torch.zeros_like(part) if part.grad is None else part.grad for part in (module.da, module.db)]
        found[layer] = torch.cat([part.flatten() for part in parts])
        for part in parts:
            part.zero_()
    return found


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Without the backward passes that are written by hand: torch makes those of norms and adapted layers for now."""
    forwards: dict[Any, Any] = {
        part: partial(part.family.forward, part) for part in model.modules() if isinstance(part, LightRMSNorm)
    }
    forwards |= {part: part.plainly for part in model.modules() if isinstance(part, AdaptedLinear)}
    with _forwards(forwards):
        yield


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Without their low-rank paths for now: a sharded base cannot be taken out of its adapters."""
    with _forwards(
        {part: part.base.__call__ for part in model.modules() if isinstance(part, AdaptedLinear | AdaptedExperts)}
    ):
        yield


@contextmanager
def _forwards(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    for part, forward in forwards.items():
        part.__dict__["forward"] = forward  # as an attribute it would be a module of the part
    try:
        yield
    finally:
        for part in forwards:
            del part.__dict__["forward"]
