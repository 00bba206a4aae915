"""The merge of a large model and its check, spread over the cluster: each worker takes a share of the weights.

All write into the files of one folder, which every node must see: in an object store there is one share.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from olora_ray.adapter import merge
from olora_ray.adapter.inject import inject, remove
from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.parity import MergedFolder
from olora_ray.adapter.stored import Group, groups, weight_files
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker_context import assigned_device
from olora_ray.common import storage
from olora_ray.common.errors import first_line
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model.folder import parameters
from olora_ray.model.load import pick_dtype, skeleton, too_large
from olora_ray.model.source import on_this_node
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import Pack, TokenStore
from olora_ray.train import checkpoints
from olora_ray.train.base_files import load_frozen
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.self_test import choose_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARE_BYTES = 4 * 2**30
"""Adapted weights that are worth the start of one more process."""

T = TypeVar("T")
Spread = Callable[[Callable[["Part"], T], Sequence["Part"]], list[T]]
"""Runs a function for each part, and gives the results in their order."""


@dataclass(frozen=True)
class Work:
    """What a share needs, as it is on this node."""

    base: Path
    model: "PreTrainedModel"
    """Without weights."""
    adapter: dict[str, AdapterWeights]
    groups: list[Group]
    """Of the whole model."""


@dataclass(frozen=True)
class Part:
    """One worker's share of a merged folder."""

    spec: TrainSpec
    checkpoint: str
    """Whose best adapter is merged."""
    folder: Path
    """The merged folder, or the one that will become it: the base's files are in it already."""
    number: int
    of: int
    work: Work | None = None
    """What it needs, if that is known in this process."""

    def __reduce__(self) -> Any:
        """Other processes read what they need themselves: there it may lie elsewhere, and it is large."""
        return Part, (self.spec, self.checkpoint, self.folder, self.number, self.of)


def prepare(spec: TrainSpec, checkpoint: str) -> Work:
    """Read the adapter and find its weights; raises UserError if one cannot be merged and is to be."""
    found = on_this_node(spec.base, spec.config)
    model, base = skeleton(found, spec.config.model), Path(found.folder)
    adapter = checkpoints.read(checkpoint).best_adapter()
    return Work(base, model, adapter, groups(base, model, adapter) if spec.config.export.merged else [])


def parts_of(spec: TrainSpec, checkpoint: str, folder: Path, place: str, work: Work) -> list[Part]:
    """As many parts as are worth it; `place` is where the folder will be."""
    size = sum(group.size for group in work.groups)
    count = 1 if storage.is_uri(place) else number_of_shares(spec.config, size)
    return [Part(spec, checkpoint, folder, number, count, work) for number in range(count)]


def number_of_shares(config: Config, size: int) -> int:
    """At most one for each worker."""
    return max(1, min(config.cluster.max_workers(), size // SHARE_BYTES))


def merge_part(part: Part) -> None:
    """Write this share of the merged weights."""
    work, share, device = _of(part)
    merge.merge(work.base, part.folder, share, work.adapter, part.spec.config.adapter.scale(), device)


def check_part(part: Part) -> MergedFolder:
    """What this share of the merged weights and of the files says."""
    work, share, device = _of(part)
    scale = part.spec.config.adapter.scale()
    worst = merge.check_weights(work.base, part.folder, share, work.adapter, scale, device)
    files = weight_files(work.base)[part.number :: part.of]
    return MergedFolder(worst, tuple(merge.changed_bytes(work.base, part.folder, work.groups, files)))


def check(work: Work, parts: Sequence[Part], spread: Spread[Any]) -> MergedFolder:
    """What the merged folder of these parts says."""
    folder = parts[0].folder
    if lines := merge.changed_files(work.base, folder):
        return MergedFolder(merge.Worst(0.0, "", "float32"), tuple(lines))
    found = spread(check_part, parts)
    lines = [line for one in found for line in one.changed]
    return MergedFolder(merge.worst_of([one.weights for one in found]), tuple(lines))


def in_turn(work: Callable[[Part], T], parts: Sequence[Part]) -> list[T]:
    """All parts in this process."""
    return [work(part) for part in parts]


def over_cluster(cpus: float) -> Spread[Any]:
    """The first part here, each other one in a Ray task of so many CPUs; this process is in a Ray task itself."""

    def spread(work: Callable[[Part], Any], parts: Sequence[Part]) -> list[Any]:
        import ray

        from olora_ray.pipeline.connection import user_errors

        job: Any = ray.remote(_quietly).options(num_cpus=cpus, max_retries=3, retry_exceptions=[OSError])
        others = [job.remote(work, part) for part in parts[1:]]
        first = work(parts[0])
        with user_errors():
            return [first, *ray.get(others)]

    return spread


def _quietly(work: Callable[[Part], T], part: Part) -> T:
    quiet_transformers()
    return work(part)


def _of(part: Part) -> tuple[Work, list[Group], torch.device]:
    work = part.work or prepare(part.spec, part.checkpoint)
    return work, merge.shares(work.groups, part.of)[part.number], assigned_device()


# The loss of a finished adapter before and after what an export does to it, in one process.


LOSS_TOKENS = 2**14
"""Tokens on which a loss is measured: one process does it, where a training has all workers."""
TRIED = 8
"""Sequences from which the self-test takes its examples."""

Adapter = Mapping[str, AdapterWeights]


@dataclass(frozen=True)
class Side:
    """An adapter on a base."""

    adapter: Adapter
    quantization: str = "none"
    """Of the base."""


@dataclass(frozen=True)
class LossPair:
    """Mean loss per supervised token of the same rows."""

    tokens: int
    """Supervised ones."""
    before: float
    after: float
    difference: float
    """after - before."""

    def in_words(self, before: str, after: str) -> str:
        """`1.2345 BEFORE, 1.2300 AFTER (-0.0045, on 1,234 tokens)`."""
        return (
            f"{self.before:.4f} {before}, {self.after:.4f} {after} ({self.difference:+.4f}, on {self.tokens:,} tokens)"
        )


def held_out_loss(
    spec: TrainSpec, work: Work, store: TokenStore, before: Side, after: Side, device: torch.device
) -> LossPair | str:
    """The training's loss on the first rows of a store with both, or why it is not measured."""
    dtype = pick_dtype(spec.config.model, device)
    if why := too_large(parameters(str(work.base)), dtype, device):
        return why
    try:
        found = _measured(spec.config, work, (before, after), _first(store), device)
    except Exception as error:  # of the model's own code: what it cannot do here says nothing of the export
        return f"the model does not run here: {first_line(error)}"
    return found if math.isfinite(found.difference) else "it is not finite"


def _measured(
    config: Config, work: Work, sides: Sequence[Side], packs: Sequence[Pack], device: torch.device
) -> LossPair:
    losses: list[float] = []
    tokens = 0
    for kind, some in itertools.groupby(sides, lambda side: side.quantization):
        own = override(config, {"model.quantization": kind})
        tokens, found = _on_one_base(own, work, [side.adapter for side in some], packs, device)
        losses += found
    before, after = losses
    return LossPair(tokens, before, after, after - before)


def _on_one_base(
    config: Config, work: Work, adapters: Sequence[Adapter], packs: Sequence[Pack], device: torch.device
) -> tuple[int, list[float]]:
    """(supervised tokens, the loss with each adapter)."""
    model: Any = load_frozen(work.base, config.model, device)
    loss = SupervisedLoss(model).to(device)
    attention = choose_attention(loss, packs[:TRIED], config, device).attention
    width = config.train.micro_batch
    batches = [collate(packs[place : place + width], attention) for place in range(0, len(packs), width)]
    losses = []
    for adapter in adapters:
        with _adapted(loss, adapter, config.adapter.scale(), device):
            losses.append(_mean(loss, batches, device))
    return sum(len(batch.labels) for batch in batches), losses


@contextmanager
def _adapted(loss: SupervisedLoss, adapter: Adapter, scale: float, device: torch.device) -> Iterator[None]:
    layers = inject(loss.model, {name: weights.factors for name, weights in adapter.items()}, scale)
    for name, layer in layers.items():
        layer.da.data.copy_(adapter[name].da)
        layer.db.data.copy_(adapter[name].db)
        layer.to(device)
    try:
        yield
    finally:
        remove(loss.model)


@torch.no_grad()
def _mean(loss: SupervisedLoss, batches: Sequence[Batch], device: torch.device) -> float:
    total = sum(float(loss(batch.to(device)).double()) for batch in batches)
    return total / sum(len(batch.labels) for batch in batches)


def _first(store: TokenStore) -> list[Pack]:
    """The first sequences, of LOSS_TOKENS in all at most, but one."""
    found: list[Pack] = []
    tokens = 0
    for number in range(store.available):
        pack = store[number]
        tokens += len(pack.input_ids)
        if found and tokens > LOSS_TOKENS:
            break
        found.append(pack)
    return found


# What it changes that an adapter was trained on a quantised base, and is exported for the original weights.


@dataclass(frozen=True)
class OnOriginal:
    """An adapter of a quantised base on the original one."""

    quantization: str
    """Of the base that it was trained on."""
    rows: Literal["held-out", "training"]
    """Which rows the loss is of: of a training that holds none out, its own."""
    loss: LossPair | str
    """On the quantised base, and on the original; or why it was not measured."""

    def to_json(self) -> dict[str, Any]:
        """For parity.json."""
        return {**asdict(self), "in_words": self.in_words()}

    def in_words(self, reasons: bool = True) -> str:
        """One sentence; without `reasons` nothing in it comes from an error on this machine."""
        what = f"trained on the base as {self.quantization}, exported for the original weights"
        name = "held-out loss" if self.rows == "held-out" else "loss on training rows"
        if isinstance(self.loss, str):
            return f"{what}; the {name} is not measured on both{f': {self.loss}' if reasons else ''}"
        return f"{what}: {name} {self.loss.in_words('on the quantised base', 'on the original')}"


def loss_on_original(spec: TrainSpec, work: Work, device: torch.device) -> OnOriginal | None:
    """The loss of the adapter of `work` on both bases; None if the base is not quantised."""
    kind = spec.config.model.quantization
    if kind == "none":
        return None
    store = spec.train if spec.eval is None else spec.eval
    found = held_out_loss(spec, work, store, Side(work.adapter, kind), Side(work.adapter), device)
    return OnOriginal(kind, "training" if spec.eval is None else "held-out", found)


# What a compressed adapter has lost: a share of the change of the weights, and what that costs on held-out rows.


@dataclass(frozen=True)
class Compressed:
    """An adapter that was exported at a smaller rank than it was trained at."""

    rank: int
    lost: float
    """Share of the change of the weights, in the Frobenius norm."""
    loss: LossPair | str | None = None
    """With the adapter as trained, and with the compressed one; or why it was not measured; None where nothing is
    lost."""

    def to_json(self) -> dict[str, Any]:
        """For parity.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def in_words(self, reasons: bool = True) -> str:
        """One sentence; without `reasons` nothing in it comes from an error on this machine."""
        share = f"{self.lost:.2%} of the change of the weights is lost"
        if self.loss is None:
            return share
        if isinstance(self.loss, str):
            return f"{share}; the held-out loss is not measured{f': {self.loss}' if reasons else ''}"
        return f"{share}; held-out loss {self.loss.in_words('before compression', 'after')}"


def compressed_loss(spec: TrainSpec, work: Work, smaller: Adapter, device: torch.device) -> LossPair | str:
    """The loss on held-out rows with the adapter of `work` and with `smaller`, both on the weights as they are stored.

    Or why it is not measured.
    """
    if spec.eval is None:
        return "no rows are held out"
    return held_out_loss(spec, work, spec.eval, Side(work.adapter), Side(smaller), device)
