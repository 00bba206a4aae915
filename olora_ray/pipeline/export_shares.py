"""The merge of a large model and its check, spread over the cluster: each worker takes a share of the weights.

All write into the files of one folder, which every node must see: in an object store there is one share.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import ray
import torch

from olora_ray.adapter import merge
from olora_ray.adapter.inject import inject, remove
from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.parity import MergedFolder
from olora_ray.adapter.stored import Group, groups, weight_files
from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker_context import assigned_device
from olora_ray.common import storage
from olora_ray.common.errors import first_line
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model.folder import parameters
from olora_ray.model.load import load_tokenizer, pick_dtype, skeleton, too_large
from olora_ray.model.source import BaseModel, on_this_node
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Pack
from olora_ray.tokens.store import TokenStore
from olora_ray.train import checkpoints
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import load_frozen
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
    """The opened base and adapter on this node, as a share of the merge needs them."""

    spec: TrainSpec
    base: BaseModel
    model: "PreTrainedModel"
    """Without weights."""
    adapter: dict[str, AdapterWeights]
    state: TrainState
    groups: list[Group]
    """The adapted weights of the whole model."""

    @cached_property
    def tokenizer(self) -> Any:
        """The base's."""
        return load_tokenizer(self.base, self.spec.config.model)


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
    """The opened base and adapter, if this process has them."""

    def __reduce__(self) -> Any:
        """Other processes read what they need themselves: there it may lie elsewhere, and it is large."""
        return Part, (self.spec, self.checkpoint, self.folder, self.number, self.of)


def prepare(spec: TrainSpec, checkpoint: str) -> Work:
    """Read the adapter and find its weights; raises UserError if one cannot be merged and is to be."""
    base, read = on_this_node(spec.base, spec.config), checkpoints.read(checkpoint)
    model, adapter = skeleton(base, spec.config.model), read.best_adapter()
    found = groups(Path(base.folder), model, adapter) if spec.config.export.merged else []
    return Work(spec, base, model, adapter, read.state, found)


def parts_of(spec: TrainSpec, checkpoint: str, folder: Path, place: str, work: Work) -> list[Part]:
    """As many parts as are worth it, at most one for each worker; `place` is where the folder will be."""
    count = 1
    if not storage.is_uri(place):
        size = sum(group.size for group in work.groups)
        count = max(1, min(spec.config.cluster.max_workers(), size // SHARE_BYTES))
    return [Part(spec, checkpoint, folder, number, count, work) for number in range(count)]


def merge_part(part: Part) -> None:
    """Write this share of the merged weights."""
    work, share, device = _of(part)
    scale = part.spec.config.adapter.scale()
    merge.merge(Path(work.base.folder), part.folder, share, work.adapter, scale, device)


def check_part(part: Part) -> MergedFolder:
    """Check this share of the merged weights and of the files."""
    work, share, device = _of(part)
    base, scale = Path(work.base.folder), part.spec.config.adapter.scale()
    worst = merge.check_weights(base, part.folder, share, work.adapter, scale, device)
    files = weight_files(base)[part.number :: part.of]
    return MergedFolder(worst, tuple(merge.changed_bytes(base, part.folder, work.groups, files)))


def check(work: Work, parts: Sequence[Part], spread: Spread[Any]) -> MergedFolder:
    """Check the merged folder of these parts."""
    if lines := merge.changed_files(Path(work.base.folder), parts[0].folder):
        return MergedFolder(merge.Worst(0.0, "", "float32"), tuple(lines))
    found = spread(check_part, parts)
    lines = [line for one in found for line in one.changed]
    return MergedFolder(merge.worst_of([one.weights for one in found]), tuple(lines))


def in_turn(work: Callable[[Part], T], parts: Sequence[Part]) -> list[T]:
    """All parts in this process."""
    return [work(part) for part in parts]


def over_cluster(cpus: float) -> Spread[Any]:
    """The first part here, each other one in a Ray task of so many CPUs; this process is in a Ray task itself."""

    def quietly(work: Callable[[Part], Any], part: Part) -> Any:
        quiet_transformers()
        return work(part)

    def spread(work: Callable[[Part], Any], parts: Sequence[Part]) -> list[Any]:
        job: Any = ray.remote(quietly).options(num_cpus=cpus, max_retries=3, retry_exceptions=[OSError])
        others = [job.remote(work, part) for part in parts[1:]]
        first = work(parts[0])
        with user_errors():
            return [first, *ray.get(others)]

    return spread


def _of(part: Part) -> tuple[Work, list[Group], torch.device]:
    work = part.work or prepare(part.spec, part.checkpoint)
    return work, merge.shares(work.groups, part.of)[part.number], assigned_device()


# The loss of a finished adapter before and after what an export does to it, in one process.


LOSS_TOKENS = 2**14
"""Tokens on which a loss is measured: one process does it, where a training has all workers."""

Adapter = Mapping[str, AdapterWeights]
Side = tuple[str, Adapter]
"""model.quantization of a base, and an adapter on it."""


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


def held_out_loss(work: Work, store: TokenStore, sides: Sequence[Side]) -> LossPair | str:
    """The training's loss on the first rows of a store on both sides, or why it is not measured."""
    config, device = work.spec.config, assigned_device()
    if why := too_large(parameters(work.base.folder), pick_dtype(config.model, device), device):
        return why
    packs, losses, tokens = _first(store), [], 0
    try:
        for kind, some in itertools.groupby(sides, lambda side: side[0]):
            own = override(config, {"model.quantization": kind})
            tokens, found = _on_one_base(own, work, [adapter for _, adapter in some], packs, device)
            losses += found
    except Exception as error:  # of the model's own code: what it cannot do here says nothing of the export
        return f"the model does not run here: {first_line(error)}"
    before, after = losses
    return LossPair(tokens, before, after, after - before) if math.isfinite(after - before) else "it is not finite"


def _on_one_base(
    config: Config, work: Work, adapters: Sequence[Adapter], packs: Sequence[Pack], device: torch.device
) -> tuple[int, list[float]]:
    """(supervised tokens, the loss with each adapter)."""
    model: Any = load_frozen(Path(work.base.folder), config.model, device)
    loss = SupervisedLoss(model).to(device)
    attention = choose_attention(loss, packs[:8], config, device).attention
    width = config.train.micro_batch
    batches = [collate(packs[place : place + width], attention) for place in range(0, len(packs), width)]
    tokens, losses = sum(len(batch.labels) for batch in batches), []
    for adapter in adapters:
        with _adapted(loss, adapter, config.adapter.scale(), device), torch.no_grad():
            losses.append(sum(float(loss(batch.to(device)).double()) for batch in batches) / tokens)
    return tokens, losses


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


# The cost of an export for the original weights, of an adapter that was trained on a quantised base.


@dataclass(frozen=True)
class OnOriginal:
    """An adapter of a quantised base on the original one."""

    quantization: str
    """model.quantization of the base that it was trained on."""
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


def loss_on_original(work: Work) -> OnOriginal | None:
    """The loss of the adapter of `work` on both bases; None if the base is not quantised."""
    spec, kind = work.spec, work.spec.config.model.quantization
    if kind == "none":
        return None
    found = held_out_loss(work, spec.eval or spec.train, [(kind, work.adapter), ("none", work.adapter)])
    return OnOriginal(kind, "held-out" if spec.eval else "training", found)


# The cost of a smaller rank: a share of the change of the weights, and a loss on held-out rows.


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


def compressed_loss(work: Work, smaller: Adapter) -> LossPair | str:
    """The loss on held-out rows with the adapter of `work` and with `smaller`, both on the weights as they are stored.

    Or why it is not measured.
    """
    if work.spec.eval is None:
        return "no rows are held out"
    return held_out_loss(work, work.spec.eval, [("none", work.adapter), ("none", smaller)])
