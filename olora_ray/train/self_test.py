"""Self-test of a model before the first step: the training must compute the same as the model itself, in any family.

Each worker runs the model on its device, on three examples, of which one is long, and checks:

- **outputs**: each part of a block gives the same output as in the model's own attention with the example alone. Both
  get the same input, so earlier parts do not amplify a difference, and rounding explains very little;
- **loss**: the training loss of each token is the cross-entropy of the model's own logits;
- **isolation**: not one bit of an example depends on the other examples, or on later tokens;
- **gradients**: the gradients of all adapters are those that torch computes with the model's own attention and logits.

The first attention (model/attention.py) that passes is used. `check_adapters` tests adapters, and `check_pair` the
gradient of preference pairs. With pairs the layout that has a prompt once (tokens/collate.py) is used if outputs and
losses of a pair pass in it, too.
"""

import inspect
import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.adapter.layer import AdaptedExperts, AdaptedLinear, AdaptedWeight, TakenWeight
from olora_ray.common.device import lacks_memory
from olora_ray.common.errors import UserError, first_line
from olora_ray.common.text import some
from olora_ray.config.decided import AnyDecided
from olora_ray.config.schema import Train
from olora_ray.model import attention
from olora_ray.model.packing import check_lengths, why_not_in_one_row
from olora_ray.tokens.collate import FLAT_ATTENTION, PROMPT_ONCE, Batch, collate
from olora_ray.tokens.plan import CHOSEN, REJECTED, Counts, Pack
from olora_ray.train import parallel
from olora_ray.train.loss import Differences, SelfTest, SupervisedLoss
from olora_ray.train.objectives.objective import objective_of
from olora_ray.train.parallel import begin_at_root
from olora_ray.train.parts import TOLERANCE, LightRMSNorm, plainly
from olora_ray.train.sharded_reader import decoder_layers

logger = logging.getLogger(__name__)

# Examples from the sequences of a token store, on which a model is tested.


SHORT = 24
LONG = 512
"""Tokens of the long example; a leak between tokens that are further apart is not noticed."""

Ids = tuple[int, ...]


def three_examples(packs: Sequence[Pack], config: AnyDecided, model: Any) -> tuple[Ids, Ids, Ids]:
    """Return three cut examples; the second repeats the text until it exceeds the model's windows, or is a sequence."""
    most = config.data.max_length
    short = max(3, min(SHORT, most // 4))
    rows = list(examples_of(packs, short))
    windows = []
    for name, value in model.config.get_text_config().to_dict().items():
        if ("window" in name or "chunk" in name) and type(value) is int and 0 < value < most:
            windows.append(value)
    # Together the three are as long as one sequence, because some models depend on the position in it. They are longer
    # only if a window needs it.
    length = min(most, max(windows) + SHORT) if windows else min(LONG, max(short, most - 2 * short))
    text = tuple(np.concatenate([pack.input_ids for pack in packs]).tolist())
    return rows[0], (text * -(-length // len(text)))[:length], rows[2]


def examples_of(packs: Sequence[Pack], longest: int) -> Iterator[Ids]:
    """Return the examples of some sequences, cut to `longest` tokens, and repeated if there are fewer than three."""
    every: list[Ids] = []
    for pack in packs:
        parts = np.split(pack.input_ids, np.cumsum(pack.segments)[:-1])
        every += [tuple(part.tolist()) for part in parts]
    long = [ids[:longest] for ids in every if len(ids) > 2]
    if not long:
        # All examples have 1 or 2 tokens, so they are joined and repeated to one that is long enough.
        long = [(3 * tuple(chain.from_iterable(every)))[:longest]]
    if len(long) < 3:
        long = [*long, *[ids[::-1] for ids in long], *long]
    return iter(long)


def one_pack(examples: Sequence[Ids]) -> Pack:
    """Pack examples into one sequence; the last tokens of each example are supervised, but never its first token."""
    ids = np.concatenate([np.array(example, dtype=np.int32) for example in examples])
    positions = [np.arange(len(example)) for example in examples]
    supervised = np.concatenate(
        [(position > 0) & (position >= len(position) - SHORT) for position in positions]
    )
    return Pack(ids, supervised, tuple(map(len, examples)))


# Parts of a model: their outputs in one run, and in a second run on the same inputs.


OF_ONE = 8
"""Factor by which a single adapter's gradient may differ more, because much cancels out in the gradients of some keys.
A mistake in the code shows in all layers of the same name, which are compared together without this factor."""


# The output of a part for one example: tokens x features.
@dataclass
class _Output:
    value: Tensor
    slope: Tensor | None = None
    """Gradient of the loss by the output, after a backward pass."""


Outputs = Mapping[tuple[str, int], list[_Output]]
"""(name of a part, index in the tuple that it returns) -> outputs in the order of its calls."""


@contextmanager
def _parts(
    model: nn.Module, shape: torch.Size, rows: Sequence[Tensor], given: Sequence[Outputs] = ()
) -> Iterator[list[Outputs]]:
    """Record the outputs of a model's parts for each example; if `given`, replace them by these outputs afterwards.

    `rows` has the positions of each example among the tokens of a batch of this `shape`. Parts are the blocks, their
    direct children, and routers of experts.
    """
    # All outputs of a router are replaced. Otherwise, where rounding decides between two experts, the second run could
    # choose another expert, and all later outputs would differ.
    recorded: list[dict[tuple[str, int], list[_Output]]] = [defaultdict(list) for _ in rows]

    def exchange(key: tuple[str, int], output: Any) -> Any:
        axis = _axis(output, shape) if isinstance(output, Tensor) else None
        if axis is None:
            return output
        values = _by_token(output.detach(), axis).clone()
        slopes = None
        for number, (positions, each) in enumerate(zip(rows, recorded, strict=True)):
            outputs = each[key]
            outputs.append(_Output(values[positions]))
            if given:
                replacement = given[number][key][len(outputs) - 1]
                values[positions] = replacement.value[: len(positions)]
                if replacement.slope is not None:
                    slopes = torch.zeros_like(values) if slopes is None else slopes
                    slopes[positions] = replacement.slope
            elif output.requires_grad:
                output.register_hook(partial(_note, outputs[-1], axis, positions))
        parts = [None if part is None else _back(part, axis, shape) for part in (values, slopes)]
        exchanged: Any = _Exchanged  # torch leaves `apply` untyped
        return exchanged.apply(output, *parts) if given else output

    def hook(name: str, whole: bool, _module: nn.Module, _inputs: object, output: Any) -> Any:
        if type(output) not in (tuple, list):
            return exchange((name, 0), output)
        return type(output)(
            exchange((name, n), part) if whole or n == 0 else part for n, part in enumerate(output)
        )

    names = {part: name for name, part in model.named_modules()}
    inside = dict[nn.Module, str]()
    for block in decoder_layers(model):
        inside |= {part: name for name, part in block.named_modules()}
    choose = {part for part, name in inside.items() if {"gate", "router"} & set(name.split("."))}
    # Norms are left out, because they give the same bits for the same input.
    wanted = [
        part
        for part, name in inside.items()
        if "." not in name and "Norm" not in type(part).__name__
    ]
    hooks = [
        part.register_forward_hook(partial(hook, names[part], part in choose))
        for part in dict.fromkeys([*wanted, *choose])
    ]
    try:
        yield list(recorded)
    finally:
        for handle in hooks:
            handle.remove()


def _axis(output: Tensor, shape: torch.Size) -> int | None:
    """Return the axis of the batch's rows, which the axis of tokens follows.

    -1 if the first axis has all tokens of all rows; None if the output has no axis of tokens.
    """
    for axis in range(output.dim()):
        if output.shape[axis : axis + 2] == shape:
            return axis
    return -1 if output.shape[:1] == (shape.numel(),) else None


def _by_token(output: Tensor, axis: int) -> Tensor:
    return output if axis < 0 else output.movedim((axis, axis + 1), (0, 1)).flatten(0, 1)


def _back(flat: Tensor, axis: int, shape: torch.Size) -> Tensor:
    return flat if axis < 0 else flat.unflatten(0, tuple(shape)).movedim((0, 1), (axis, axis + 1))


def _note(output: _Output, axis: int, positions: Tensor, slope: Tensor) -> None:
    output.slope = _by_token(slope, axis)[positions]


class _Exchanged(torch.autograd.Function):
    """Function that replaces an output by other values, and their gradient by another gradient if one is set."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, values: Tensor, slopes: Tensor | None) -> Tensor:
        ctx.slopes = slopes
        return values.clone()  # not a view, because some families add to it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] if ctx.slopes is None else ctx.slopes, None, None


def _alone(
    loss: SupervisedLoss, example: Ids, device: torch.device, backward: bool = False
) -> tuple[Outputs, Tensor]:
    model: Any = loss.model
    ids = torch.tensor([example], device=device)
    last = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        last = {"logits_to_keep": SHORT + 1}
    with (
        torch.set_grad_enabled(backward),
        _parts(model, ids.shape, _positions([[example]], ids)) as (parts,),
    ):
        logits = model(input_ids=ids, use_cache=False, **last).logits[0, -SHORT - 1 : -1]
        losses = F.cross_entropy(logits.float(), ids[0, 1:][-SHORT:], reduction="none")
    if backward:
        losses.sum().backward()
    return parts, losses.detach()


def _positions(groups: Sequence[Sequence[Ids]], ids: Tensor) -> list[Tensor]:
    """Return the flat positions of each example in a batch `ids`, which has one row per group or a single row."""
    positions = []
    start = 0
    for number, group in enumerate(groups):
        start = start if len(ids) == 1 else number * ids.shape[1]
        for example in group:
            positions.append(torch.arange(start, start + len(example), device=ids.device))
            start += len(example)
    return positions


def _off_losses(measured: Tensor, wanted: Sequence[Tensor]) -> float:
    expected = torch.cat([*wanted])
    return float((measured - expected).abs().mean() / (1 + expected.mean()))


def _worst(measured: Outputs, wanted: Outputs) -> tuple[float, str]:
    off = []
    for key, outputs in wanted.items():
        for output, expected in zip(measured[key], outputs, strict=True):
            if expected.value.is_floating_point():
                off.append((_off(output.value, expected.value[: len(output.value)]), key[0]))
    return max(
        ((float(value.nan_to_num(math.inf)), name) for value, name in off), default=(0.0, "")
    )


def _off(measured: Tensor, wanted: Tensor) -> Tensor:
    """Return the relative difference of the worst run of tokens, or half of the worst token's if that is larger."""
    # The second finds mistakes that few tokens see, such as a window that ends one token too late.
    output, expected = (part.float().reshape(len(part), -1) for part in (measured, wanted))
    size = expected.norm(dim=1)
    off = (output - expected).norm(dim=1) / (
        size + size.median() / 8 + torch.finfo(torch.float32).tiny
    )
    pieces = [part.square().mean().sqrt() for part in off.tensor_split(max(1, len(off) // SHORT))]
    return torch.stack([*pieces, off.max() / 2]).max()


# Choice of a base's attention.


def choose_attention(
    loss: SupervisedLoss, packs: Sequence[Pack], config: AnyDecided, device: torch.device
) -> SelfTest:
    """Test the base model without its adapters on examples of `packs`, and set the first attention that passes.

    All workers of a sharded base must call it together. Raises UserError, with the setting to change, if none passes.
    """
    with bare(loss.model), _taken_as_user_error():
        try:
            return _first_that_passes(loss, packs, config, device)
        except UserError:
            # Its advice fits only causal models, so look for another reason first.
            if loss.sharded or not _sees_ahead(loss.model, packs, device):
                raise
            raise UserError(
                f"model.name: {type(loss.model).__name__} is no causal language model: its output for a token"
                " depends on later tokens; name another model"
            ) from None


@contextmanager
def _taken_as_user_error() -> Iterator[None]:
    try:
        yield
    except TakenWeight as error:
        raise UserError(
            f"adapter.targets: {first_line(error)}; leave it out of adapter.targets"
        ) from None


@torch.no_grad()
def _sees_ahead(model: Any, packs: Sequence[Pack], device: torch.device) -> bool:
    # Another last token must not change the output for earlier tokens, except by rounding errors.
    model.set_attn_implementation(attention.own(model))
    ids = torch.tensor([next(examples_of(packs, SHORT))], device=device)
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    own, changed = (
        model(input_ids=each, use_cache=False).logits[0, :-1].float().softmax(-1)
        for each in (ids, other)
    )
    return float((own - changed).abs().sum(-1).mean()) > 0.02


def _first_that_passes(
    loss: SupervisedLoss, packs: Sequence[Pack], config: AnyDecided, device: torch.device
) -> SelfTest:
    model: Any = loss.model
    began = time.perf_counter()
    dtype = next(model.parameters()).dtype
    check_lengths(model, config)
    tokens = config.train.micro_batch * config.data.max_length
    names = attention.candidates(model, config.model, dtype, device)
    # Some models cannot have all examples of a micro-batch in one row, whatever the attention.
    why_not = why_not_in_one_row(model, tokens)
    wanted = [name for name in names if why_not is None or name not in FLAT_ATTENTION]
    if not wanted:
        raise UserError(
            f"model.attention={names[0]}: it puts all examples of a micro-batch into one row, but"
            f" {type(model).__name__} {why_not}; set model.attention: auto"
        )
    # `packs` are only the first sequences. Even if each has one example, later ones may have several.
    packed = config.data.packing or any(len(pack.segments) > 1 for pack in packs)
    examples = three_examples(packs, config, model)
    beside = packed or config.train.micro_batch > 1
    trial = _Trial(loss, examples if beside else examples[1:2], packed, device)
    failed = attention.left_out(model, config.model, dtype, device)
    for name in wanted:
        problem, differences = trial.run(name)
        if problem is None:
            model.set_attn_implementation(name)
            for rejected, why in failed.items():
                logger.info(f"attention {name} instead of {rejected}: {why}")
            once = False
            if any(pack.roles for pack in packs) and name in attention.JOINS:
                why_twice = trial.once(name)
                once = why_twice is None
                if why_twice:
                    logger.info(f"both answers of a pair have a prompt of their own: {why_twice}")
            return SelfTest(
                name,
                loss.given_masks,
                failed,
                differences,
                seconds=time.perf_counter() - began,
                once=once,
            )
        failed[name] = problem
    text = _refusal(type(model).__name__, failed, trial)
    free = attention.candidates(
        model, config.model.model_copy(update={"attention": "auto"}), dtype, device
    )
    instead = next(
        (name for name in free if name not in failed and trial.run(name)[0] is None), None
    )
    if instead is not None:
        family = type(model).__name__
        why = failed[wanted[-1]]
        text = f"model.attention={wanted[-1]}: with {family}, {why}; set model.attention: {instead}"
    raise UserError(text)


def require_layout(loss: SupervisedLoss, config: AnyDecided) -> None:
    """Raise UserError if the attention that passed for another trial does not work with the settings of this one."""
    # Trials of a search may share a base, and differ in the number of sequences that go through it at once.
    model: Any = loss.model
    check_lengths(model, config)
    why = why_not_in_one_row(model, config.train.micro_batch * config.data.max_length)
    if loss.tested is not None and loss.tested.attention in FLAT_ATTENTION and why:
        raise UserError(
            f"train.micro_batch={config.train.micro_batch}: other trials on this base put all examples of a micro-batch"
            f" into one row, but {type(model).__name__} {why}; set trials_per_worker: 1 or"
            " model.attention: sdpa"
        )


def _refusal(family: str, failed: Mapping[str, str], trial: "_Trial") -> str:
    name, why = list(failed.items())[-1]
    if trial.only_beside and trial.packed:
        return f"data.packing: with {family}, {why}; set data.packing: false"
    if trial.only_beside:
        return f"train.micro_batch: with {family}, {why}; set train.micro_batch: 1"
    return f"model.name: {family} cannot be trained here: with attention {name}, {why}"


class _Trial:
    """A test of one attention after the other on the same examples, of which the long one is in the middle."""

    def __init__(
        self, loss: SupervisedLoss, examples: Sequence[Ids], packed: bool, device: torch.device
    ) -> None:
        model: Any = loss.model
        self.loss = loss
        self.model = model
        self.packed = packed
        self.device = device
        self.only_beside = False
        """True if the last attention was wrong only with several examples together."""
        model.set_attn_implementation(attention.own(model))
        # FSDP must know its root before an attention that may fail, with which later runs would fail otherwise.
        begin_at_root(loss)
        self.examples = [(ids, *_alone(loss, ids, device)) for ids in examples]
        self.routing = set[str]()
        """Parts that multiply all rows of an expert at once: with other rows, the rounding differs."""
        for name, _ in self.examples[0][1]:
            for inner, module in model.get_submodule(name).named_modules():
                if inner.endswith("experts") or hasattr(module, "num_experts"):
                    self.routing.add(name)

    def run(self, name: str) -> tuple[str | None, Differences | None]:
        self.loss.given_masks = False
        problem, differences = self._try(name)
        # Some families ignore the positions in their own masks, and pass if they get masks as inputs.
        if (
            differences is not None
            and problem is not None
            and self.packed
            and name in ("sdpa", "eager")
        ):
            beside = self.only_beside
            self.loss.given_masks = True
            problem_with_masks, given = self._try(name)
            if problem_with_masks is None:
                return None, given
            self.only_beside = beside
            self.loss.given_masks = False
        return problem, differences

    def once(self, name: str) -> str | None:
        """Return why this attention, which has passed, does not take a pair with its prompt once; None if it does."""
        text = self.examples[0][0][:SHORT]
        answers = ((*text, *text), (*text, *text[::-1]))
        self.model.set_attn_implementation(attention.own(self.model))
        given, wanted = zip(*[_alone(self.loss, ids, self.device) for ids in answers], strict=True)
        self.model.set_attn_implementation(name)
        pair = replace(one_pack(answers), roles=(CHOSEN, REJECTED))
        batch = collate([pair], name + PROMPT_ONCE).to(self.device)
        ids: Any = batch.inputs["input_ids"]
        whole_rows: Any = batch.inputs["whole_rows"]
        try:
            with _parts(self.model, ids.shape, whole_rows.chunk(2), given) as outputs:
                losses = self.loss.each(batch)
        except (UserError, ValueError, RuntimeError, TypeError, LookupError) as error:
            return f"its forward fails: {type(error).__name__}: {first_line(error)}"
        output, part = max(map(_worst, outputs, given))
        off = _off_losses(losses, wanted)
        return Differences(output, part, off, 0.0, "", TOLERANCE[self.model.dtype]).problem()

    def _try(self, name: str) -> tuple[str | None, Differences | None]:
        self.only_beside = False
        part = "forward"
        try:
            self.model.set_attn_implementation(name)
            differences = self._differences(name, self.examples)
            if differences.problem() is not None and len(self.examples) > 1:
                alone = self._differences(name, self.examples[1:2])
                self.only_beside = alone.problem() is None
                differences = differences if self.only_beside else alone
            if differences.problem() is None:
                part = "backward pass"
                self._run_backward(name)
        except (
            UserError,
            ImportError,
            ValueError,
            RuntimeError,
            TypeError,
            AttributeError,
            LookupError,
        ) as error:
            if lacks_memory(error, self.device):
                raise
            why = first_line(error)
            if isinstance(error, UserError):
                return why.partition(": ")[2].partition(";")[0], None
            return f"its {part} fails: {type(error).__name__}: {why}", None
        where = "in its sequence" if self.packed else "in its micro-batch"
        return differences.problem(where if self.only_beside else None), differences

    def _differences(
        self, name: str, examples: Sequence[tuple[Ids, Outputs, Tensor]]
    ) -> Differences:
        texts, given, own = zip(*examples, strict=True)
        first, losses = self._run(name, texts, dict(enumerate(given)))
        output, part = max(map(_worst, first, given))
        # The long example must not see these changes: reversed tokens in the other examples, and its own last token.
        long = len(texts) // 2
        changed = [
            (*ids[:-1], ids[0]) if number == long else ids[::-1] for number, ids in enumerate(texts)
        ]
        (second,), _ = self._run(name, changed, {long: given[long]}, but_last=True)
        change, of = _worst(
            second, {key: value for key, value in first[long].items() if key[0] not in self.routing}
        )
        return Differences(
            output=output,
            part=part,
            loss=_off_losses(losses, own),
            change=change,
            changed=of,
            tolerance=TOLERANCE[self.model.dtype],
        )

    def _run_backward(self, name: str) -> None:
        """Run the backward pass of all blocks. Some kernels lack it for a size of heads or a GPU.

        `check_adapters` compares its gradients.
        """
        _, batch = self._laid_out(name, [ids for ids, *_ in self.examples])
        blocks = decoder_layers(self.model)
        if not blocks:
            return
        with torch.enable_grad(), _with_gradient(blocks[0]):
            total: Tensor = self.loss(batch)
            if total.requires_grad:
                total.backward()

    def _laid_out(self, name: str, texts: Sequence[Ids]) -> tuple[list[Sequence[Ids]], Batch]:
        """Return the texts of each sequence, and their batch, as in the training."""
        groups = [texts[:2], texts[2:]] if self.packed else [[one] for one in texts]
        packs = [one_pack(group) for group in groups if group]
        return list(groups), collate(packs, name).to(self.device)

    def _run(
        self, name: str, texts: Sequence[Ids], given: Mapping[int, Outputs], but_last: bool = False
    ) -> tuple[list[Outputs], Tensor]:
        # Outputs are recorded only for the texts in `given`.
        groups, batch = self._laid_out(name, texts)
        ids: Any = batch.inputs["input_ids"]
        positions = _positions(groups, ids)
        rows = [positions[number][: -1 if but_last else None] for number in given]
        with _parts(self.model, ids.shape, rows, list(given.values())) as outputs:
            return outputs, self.loss.each(batch)


@contextmanager
def _with_gradient(block: nn.Module) -> Iterator[None]:
    """Give the input of a block a gradient, as adapters in the blocks before it would."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not inputs:
            return inputs
        # A copy, because some families change it in place.
        return inputs[0].detach().requires_grad_().clone(), *inputs[1:]

    handle = block.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# Test of a model's adapters before the first step: they change nothing yet, and a gradient reaches each.


_EXPERT = re.compile(r"([^.]*expert[^.]*)\.(?:expert_)?\d+(?=\.)")
"""Matches the index of an expert that is a module of its own, as in `mlp.experts.3.up_proj`."""


def check_adapters(
    loss: SupervisedLoss,
    adapted: Mapping[str, AdaptedWeight],
    packs: Sequence[Pack],
    name: str,
    device: torch.device,
    new: bool,
    named: bool = True,
) -> tuple[list[str], float]:
    """Return the adapters that no gradient reaches, and the largest relative difference of the others' gradients.

    Raises UserError if no gradient reaches an adapter that the user has `named`, if a gradient is wrong, or if
    untrained (`new`) adapters change a bit of a loss. `name` is the attention. All gradients are zero afterwards.
    """
    with _taken_as_user_error():
        without, off = _try(loss, adapted, list(examples_of(packs, SHORT))[:3], name, new)
    if without and named:
        raise UserError(
            f"adapter.targets: no gradient reaches {some(without)}, because text does not use these"
            " layers; leave them out"
        )
    return without, off


def _try(
    loss: SupervisedLoss,
    adapted: Mapping[str, AdaptedWeight],
    examples: Sequence[Ids],
    name: str,
    new: bool,
) -> tuple[list[str], float]:
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
                f"adapter.targets: untrained adapters change the loss of {type(model).__name__} by {off:.2g};"
                " choose plain linear layers only"
            )
    if loss.recompute:
        loss(batch).backward()
        with_it = _gradients(adapted)
        with parallel.switched(loss, on=False):
            loss(batch).backward()
        parallel.check_same(
            type(model).__name__, list(with_it.values()), list(_gradients(adapted).values())
        )
    with parallel.switched(loss, on=False):
        model.set_attn_implementation(attention.own(model))
        with _plain(model), plainly(loss):
            given = [_alone(loss, ids, device, backward=True)[0] for ids in examples]
        # These are the gradients to compare with: torch's own, without the backward passes written by hand.
        wanted = _gradients(adapted)
        model.set_attn_implementation(name)
        ids: Any = batch.inputs["input_ids"]
        with _parts(model, ids.shape, _positions([[one] for one in examples], ids), given):
            total: Tensor = loss(batch)
        with _reached(adapted) as reached:
            total.backward()
    gradients = _gradients(adapted)
    # An expert may get none of the few test tokens, so it counts as reached if another expert of its layer was.
    layers_reached = {_EXPERT.sub(r"\1.*", layer) for layer in reached}
    without = [
        layer
        for layer in gradients
        if layer not in reached and _EXPERT.sub(r"\1.*", layer) not in layers_reached
    ]
    # Layers that differ only in their numbers are compared together: a mistake in the code is in all of them.
    alike: dict[str, list[str]] = defaultdict(list)
    for layer in gradients.keys() - without:
        alike[re.sub(r"\d+", "*", layer)].append(layer)
    differences = {
        pattern: _relative(gradients, wanted, layers) for pattern, layers in alike.items()
    }
    differences |= {
        layer: _relative(gradients, wanted, [layer]) / OF_ONE
        for layer in gradients.keys() - without
    }
    worst, size = max(differences.items(), key=itemgetter(1), default=("", 0.0))
    if not size <= TOLERANCE[model.dtype]:
        own = attention.own(model)
        raise UserError(
            f"model.name: {type(model).__name__}: with attention {name}, the gradient of {worst} has a relative error"
            f" of {size:.2g}, more than rounding explains;"
            + (
                " this model cannot be trained here"
                if name == own
                else f" set model.attention: {own}"
            )
        )
    return without, size


# Test of preference pairs before the first step: a step must compute the losses of the reference, and the gradient of
# a pair must be that of its two answers alone, with which `check_adapters` has compared torch's own.


FIRST_MARGIN = 1.0
"""Nats of margin before the first step that rounding on a GPU may make; on CPUs there is none."""
MARGIN = 3.0
"""Nats by which a pair is preferred in the test of its gradient."""


def check_pair(
    loss: SupervisedLoss,
    adapted: Mapping[str, AdaptedWeight],
    pack: Pack,
    train: Train,
    name: str,
    device: torch.device,
) -> None:
    """Raise UserError if a step would compute other losses or gradients of pairs than it must.

    `pack` has pairs and the losses of the present adapter. `name` is the attention. All gradients are zero afterwards.
    """
    model: Any = loss.model
    objective = objective_of(train)
    batch = collate([pack], name).to(device)
    numbers = objective.each(loss, batch, sum(pack.examples(), Counts()))
    margins = numbers[:, 1 + objective.more.index("margin")]
    margin = float(margins.detach().abs().max())

    parts = np.split(pack.input_ids, np.cumsum(pack.segments)[:-1])
    first = pack.roles.index(CHOSEN)
    alone = []
    for part in parts[first : first + 2]:
        ids: Ids = tuple(part[-SHORT:].tolist())
        total: Tensor = loss(collate([one_pack([ids])], name).to(device))
        total.backward()
        alone.append((ids, total.item(), torch.cat([*_gradients(adapted).values()])))
    differences = []
    # Exchanged answers must have the opposite gradient, so both orders are compared.
    for chosen, rejected in (alone, alone[::-1]):
        pair = replace(
            one_pack([chosen[0], rejected[0]]),
            roles=(CHOSEN, REJECTED),
            reference=(chosen[1] + MARGIN, rejected[1]),
        )
        [size] = pair.examples()
        objective.loss(loss, collate([pair], name).to(device), size)[0].backward()
        found = torch.cat([*_gradients(adapted).values()])
        # The slope of log(1 + exp(-beta m)), and of the plain training on the chosen answer.
        slope = train.beta / (1 + math.exp(train.beta * MARGIN))
        up = (slope + train.chosen / size.chosen) * chosen[2]
        down = slope * rejected[2]
        differences.append(float((found - up + down).norm() / (up.norm() + down.norm())))

    if not margin <= FIRST_MARGIN:
        raise UserError(
            f"train.objective: before the first step a pair has a margin of {margin:.2g} nats, and must have none: the"
            " model computes other losses in a step than before it; set train.micro_batch: 1 or model.attention: sdpa"
        )
    # In bfloat16 the outputs of two layouts differ, and more from block to block: SmolLM2's gradients by 0.033.
    if not max(differences) <= OF_ONE * TOLERANCE[model.dtype]:
        raise UserError(
            f"train.objective: with attention {name}, the gradient of a preference pair has a relative error of"
            f" {max(differences):.2g}, more than rounding explains; set model.attention: sdpa"
        )


@contextmanager
def _reached(adapted: Mapping[str, AdaptedWeight]) -> Iterator[set[str]]:
    """Collect the adapters that a gradient reaches, even if the gradient is zero."""
    # A block whose weights start at zero passes on zero gradients at first, but it is trained later.
    reached: set[str] = set()
    hooks = []

    def note(layer: str, grad: Tensor | None) -> None:
        if grad is not None:
            reached.add(layer)

    for layer, module in adapted.items():
        hooks.append(module.da.register_hook(partial(note, layer)))
        hooks.append(module.db.register_hook(partial(note, layer)))
    try:
        yield reached
    finally:
        for hook in hooks:
            hook.remove()


def _relative(
    measured: Mapping[str, Tensor], wanted: Mapping[str, Tensor], layers: Sequence[str]
) -> float:
    """Return the relative difference of the gradients of some layers together; infinite if one is not finite."""
    ours = torch.cat([measured[layer] for layer in layers])
    theirs = torch.cat([wanted[layer] for layer in layers])
    return float(((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).nan_to_num(math.inf))


def _gradients(adapted: Mapping[str, AdaptedWeight]) -> dict[str, Tensor]:
    vectors = {}
    for layer, module in adapted.items():
        parts = [
            torch.zeros_like(part) if part.grad is None else part.grad
            for part in (module.da, module.db)
        ]
        vectors[layer] = torch.cat([part.flatten() for part in parts])
        for part in parts:
            part.zero_()
    return vectors


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Let torch compute the backward passes of norms and adapted layers, instead of those written by hand."""
    by_hand = (LightRMSNorm, AdaptedLinear)
    with _forwards({part: part.plainly for part in model.modules() if isinstance(part, by_hand)}):
        yield


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Switch off the low-rank paths of all adapters inside the block."""
    # The adapters themselves stay, because a sharded base cannot be taken out of them.
    with _forwards(
        {
            part: part.base.__call__
            for part in model.modules()
            if isinstance(part, AdaptedLinear | AdaptedExperts)
        }
    ):
        yield


@contextmanager
def _forwards(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    for part, forward in forwards.items():
        # setattr would register a forward that is a module as a child of the part.
        part.__dict__["forward"] = forward
    try:
        yield
    finally:
        for part in forwards:
            del part.__dict__["forward"]
