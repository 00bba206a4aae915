"""The merge of a large model and its check, spread over the cluster: each worker takes a share of the weights.

All write into the files of one folder, which every node must see: in an object store there is one share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from olora_ray.adapter import merge, merge_check
from olora_ray.adapter.factors import AdapterWeights
from olora_ray.adapter.parity import MergedFolder
from olora_ray.adapter.stored import weight_files
from olora_ray.adapter.weight_group import Group
from olora_ray.adapter.weight_names import groups
from olora_ray.cluster.device import assigned_device
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.common.quiet import quiet_transformers
from olora_ray.config.schema import Config
from olora_ray.model.load import skeleton
from olora_ray.model.source import on_this_node
from olora_ray.train import checkpoints

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
    worst = merge_check.check_weights(work.base, part.folder, share, work.adapter, scale, device)
    files = weight_files(work.base)[part.number :: part.of]
    return MergedFolder(worst, tuple(merge_check.changed_bytes(work.base, part.folder, work.groups, files)))


def check(work: Work, parts: Sequence[Part], spread: Spread[Any]) -> MergedFolder:
    """What the merged folder of these parts says."""
    folder = parts[0].folder
    if lines := merge_check.changed_files(work.base, folder):
        return MergedFolder(merge_check.Worst(0.0, "", "float32"), tuple(lines))
    found = spread(check_part, parts)
    lines = [line for one in found for line in one.changed]
    return MergedFolder(merge_check.worst_of([one.weights for one in found]), tuple(lines))


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
