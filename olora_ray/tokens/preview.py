"""Preview of a token store for --dry-run: what preparing it would give, without Ray and without writing a file.

Small data is read completely, and judged as a run judges it. Of large data some rows of many positions are read, and
the results are scaled up. Of data that is too large to be scanned some files are read, most of them at their beginning
only: a file that is sorted by length then misleads, and the preview says so.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError
from olora_ray.config.decided import DataConfig
from olora_ray.config.section import Source
from olora_ray.data.detect import read_as
from olora_ray.data.formats import format_named
from olora_ray.data.reader import FileScan, Units
from olora_ray.data.scan import head, scan
from olora_ray.data.sources import File
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens import manifest
from olora_ray.tokens import shard as shards
from olora_ray.tokens.manifest import NOT_JUDGED, Judged, Limits, RejectedRows, Totals
from olora_ray.tokens.plan import (
    Floats,
    Pack,
    Plan,
    RowDigests,
    Split,
    looking,
    make_plan,
    sample,
)

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

# Bytes up to which all files are scanned, which takes some seconds; of larger data some files are sampled.
SCAN_ALL = 2 * 2**30
# Factor on the bytes of a file of this type: reading it takes longer, or samples from its middle say as much. Other
# compressed files have the factor 4.
SLOW = {"csv": 16, "tsv": 16, "json": 16, "parquet": 16, "jsonl": 4}
# Sampled files per source, and sampled positions of these.
FILES_LOOKED_AT = 32
# Bytes of text up to which all rows are tokenised, at about a second per megabyte.
READ_ALL = 8 * 2**20
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Example:
    origin: str
    """Place of the row, in the form file:line."""
    input_ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    """Its supervised tokens."""


@dataclass(frozen=True)
class SourceRows:
    setting: str
    """Setting that names the source, such as data.train.0."""
    source: Source
    rows: int
    """Rows, rejected ones included."""
    rejected: int


@dataclass(frozen=True)
class Preview:
    limits: Limits
    rows: int
    """Rows, rejected ones included."""
    packs: int
    tokens: int
    supervised: int
    fill: float
    """Tokens / (packs * max_length)."""
    read: int
    """Rows that were read: all, if `exact`."""
    rejected: dict[str, int]
    """Rejected ones of the rows that were read, by reason."""
    judged: Judged
    """The rows to which the limit on rejected rows applies."""
    exact: bool
    """False: rows, packs, tokens and supervised are estimates."""
    note: str
    """Facts that are unknown because not all files were scanned."""
    lengths: tuple[int, ...]
    """Tokens of an example, at the QUANTILES of the examples."""
    longest: int
    """Tokens of the longest example that is no plain text, because that is cut in pieces; 0 if there is none."""
    too_long: int
    """Rows of more than data.max_length tokens, of the rows that were read."""
    sources: tuple[SourceRows, ...]
    examples: tuple[Example, ...]
    """The first training example, and the next from another source if there is one."""
    digests: RowDigests
    """Digests of the rows that were read."""
    some_packs: tuple[Pack, ...]
    """The first sequences."""

    def rejections(self) -> str:
        return manifest.reason_counts(self.rejected)


def describe_splits(config: DataConfig, spec: TokenizerSpec) -> tuple[Preview, Preview | None]:
    """Preview the training rows, and the held-out rows if there are any; log held-out rows that are training rows too.

    Raise UserError as the preparation would.
    """
    if not config.data.holds_out():
        return describe(config, spec), None
    # 500 held-out rows are enough for their lengths, and are read within seconds.
    held_out = describe(config, spec, "eval", 500)
    if config.data.eval_fraction is not None:
        return describe(config, spec, held_out=held_out), held_out
    train = describe(config, spec)
    apart = manifest.HeldOut(held_out.digests)
    apart.meet(train.digests)
    line = apart.line()
    if line:
        logger.warning(line)
    return train, held_out


def describe(
    config: DataConfig,
    spec: TokenizerSpec,
    split: Split = "train",
    limit: int = 2000,
    tell: bool = True,
    held_out: Preview | None = None,
) -> Preview:
    """Preview a split, of large data from about `limit` rows; `tell` logs notes about unusual rows.

    `held_out` are the rows that data.eval_fraction holds out: their copies are left out, and the limit on rejected rows
    applies to both together.

    Raise UserError as the preparation would. For large data, the limit on rejected rows applies to the rows that were
    read.
    """
    look = _Look(config.run.storage)
    plan = make_plan(config, spec, split, looking(config.run.storage, look, read_as))
    judged = NOT_JUDGED
    if held_out:
        plan = replace(plan, held_out=np.unique(held_out.digests))
        judged = held_out.judged
    exact = look.complete and plan.pieces.bytes <= READ_ALL
    part = plan
    drawn = look.sizes
    weights = [1.0] * len(plan.sources)
    which = ""
    if not exact:
        part, drawn = sample(plan, limit)
        weights = [source.weight * plan.kept_share for source in plan.sources]
        noted = ["of the rows that a dry run reads of large data", *sorted(look.notes)]
        which = f" ({'; '.join(noted)})"
    limits = Limits.of(config, split)
    if tell and (split == "train" or config.data.eval):
        for line in manifest.form_lines(plan):
            logger.info(line)
    made, totals = _made(part, limits, judged, which)
    if tell:
        for line in manifest.lines(totals.notes):
            logger.info(f"of the rows read, {line}")
    times = look.sizes * np.array(weights)[:, None] / np.maximum(drawn, 1.0)
    preview = _preview(part, limits, made, totals, times)
    return replace(preview, exact=exact, note="; ".join(sorted(look.notes)))


def _made(
    plan: Plan, limits: Limits, held_out: Judged, which: str
) -> tuple[list[shards.Shard], Totals]:
    # As `prepare.make` does it, but in memory; `which` ends the error, because only some rows may have been read.
    totals = Totals(plan, RejectedRows(plan), held_out)
    made = []
    for number in range(len(plan.shards)):
        made.append(shards.build(plan, plan.part(number)))
        totals.add(made[-1].sidecar(b""), fresh=True)
        if totals.hopeless(limits):
            break
    try:
        totals.check(limits)
    except UserError as error:
        raise UserError(f"{error}{which}") from None
    return made, totals


def _preview(
    plan: Plan, limits: Limits, made: Sequence[shards.Shard], totals: Totals, times: Floats
) -> Preview:
    """Return the preview; `times` (sources, 2) are the factors that scale up rows and bytes of each source."""
    total = totals.total
    counts = []
    source = []
    read = Counter[int]()
    rejected = Counter[int]()
    digests = []
    for shard in made:
        for example in shard.examples:
            counts.append((len(example.ids), np.count_nonzero(example.supervised)))
        source += [_source_of(plan, origin) for origin in shard.origins]
        read.update(shard.rows_of)
        rejected.update(entry["source"] for entry in shard.rejected)
        digests += shard.digests
    tokens, supervised = times[source, 1] @ np.array(counts)
    lengths = [length for length, _ in counts]
    first = next(shard for shard in made if shard.packs)  # some shard may have no held-out row
    whole_rows = [
        length
        for length, number in zip(lengths, source, strict=True)
        if format_named(plan.sources[number].format).makes != "text"
    ]
    some_packs = []
    for members in first.packs[:8]:
        chosen = [first.examples[number] for number in members]
        ids = np.concatenate([example.ids for example in chosen])
        marked = np.concatenate([example.supervised for example in chosen])
        some_packs.append(Pack(ids, marked, tuple(len(example.ids) for example in chosen)))
    return Preview(
        limits=limits,
        rows=round(sum(count * times[number, 0] for number, count in read.items())),
        packs=round(total["packs"] * tokens / total["tokens"]),
        tokens=round(tokens),
        supervised=round(supervised),
        fill=total["tokens"] / (total["packs"] * plan.max_length),
        read=total["rows"],
        rejected=dict(sorted(totals.reasons.items())),
        judged=totals.judged(),
        exact=True,
        note="",
        lengths=tuple(
            int(n) for n in np.quantile(lengths, QUANTILES, method="closest_observation")
        ),
        longest=max(whole_rows, default=0),
        too_long=totals.reasons["too_long"] + totals.notes["cut"] + totals.notes["drop_turns"],
        sources=tuple(
            SourceRows(f"{limits.setting}.{number}", each, read[number], rejected[number])
            for number, each in enumerate(plan.sources)
        ),
        examples=_examples(plan, first),
        digests=np.frombuffer(b"".join(digests), dtype=np.uint64),
        some_packs=tuple(some_packs),
    )


def _source_of(plan: Plan, origin: int) -> int:
    return plan.files[origin >> manifest.POSITION_BITS].source


def _examples(plan: Plan, shard: shards.Shard) -> tuple[Example, ...]:
    first, *rest = itertools.chain.from_iterable(shard.packs)
    source = [_source_of(plan, origin) for origin in shard.origins]
    others = [number for number in rest if source[number] != source[first]] or rest
    files = [each.file.uri for each in plan.files]
    examples = list[Example]()
    for number in (first, *others[:1]):
        tokens = shard.examples[number]
        examples.append(
            Example(
                manifest.origin_name(files, shard.origins[number]), tokens.ids, tokens.supervised
            )
        )
    return tuple(examples)


class _Look:
    """Scans small data completely, and samples large data."""

    def __init__(self, storage_root: str) -> None:
        self._storage = storage_root
        self.complete = True
        # (sources, 2) rows and bytes of each.
        self.sizes: Floats = np.zeros((0, 2))
        # Facts that are unknown about large data.
        self.notes: set[str] = set()

    def __call__(self, sources: Sequence[Sequence[File]]) -> list[list[FileScan]]:
        cost = 0
        for file in itertools.chain.from_iterable(sources):
            cost += file.size * SLOW.get(file.kind, 4 if file.compression else 1)
        self.complete = cost <= SCAN_ALL
        scans = [self._source(files) for files in sources]
        sizes = [np.sum(list(map(_size, found)), axis=0) for found in scans]
        self.sizes = np.array(sizes)
        return scans

    def _source(self, files: Sequence[File]) -> list[FileScan]:
        if self.complete:
            return [scan(file, self._storage, keep=False) for file in files]
        seen = _spread(range(len(files)), FILES_LOOKED_AT)
        size = max(sum(files[number].size for number in seen), 1)
        times = sum(file.size for file in files) / size
        scans = [FileScan("", 0, (), Units.of(()))] * len(files)
        for number in seen:
            scanned = self._start(
                files[number], max(1, FILES_LOOKED_AT * files[number].size // size)
            )
            scans[number] = replace(scanned, rows=round(scanned.rows * times))
        return scans

    def _start(self, file: File, count: int) -> FileScan:
        found = head(file)
        if file.kind != "parquet":
            self.notes.add(
                f"only the beginnings of {file.compression or file.kind} files, so sorted files mislead"
            )
            return replace(found, units=Units.of(_spread(found.units, count)))
        units = []
        for first in _spread(range(found.rows), count):
            unit = found.units[int(np.searchsorted(found.units.table["first"], first, "right")) - 1]
            rows = min(256, unit.first + unit.rows - first)
            units.append(replace(unit, first=first, rows=rows, size=unit.size * rows // unit.rows))
        return replace(found, units=Units.of(units))


def _size(scan: FileScan) -> tuple[float, float]:
    # Rows of a file, and their bytes, estimated from its units.
    return scan.rows, scan.rows * float(scan.units.table["size"].sum()) / max(scan.units.rows, 1)


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    count = min(most, len(items))
    return [items[int((number + 0.5) * len(items) / count)] for number in range(count)]
