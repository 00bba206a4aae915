"""Preview of a token store for --dry-run: what preparing it would give, without Ray and without writing a file.

Small data is read as a whole, and judged as the run judges it; of large data some rows of many places are read,
and what they say is scaled up.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config, Source
from olora_ray.data.reader import FileScan, Units
from olora_ray.data.scan import head, scan
from olora_ray.data.sources import File, total_bytes
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens import manifest
from olora_ray.tokens import shard as shards
from olora_ray.tokens.first_look import read_as
from olora_ray.tokens.manifest import Limits, RejectedRows, Totals
from olora_ray.tokens.plan import Pack, Plan, Split, looking, make_plan, sample, sources_of

logger = logging.getLogger(__name__)

SCAN_ALL = 2 * 2**30
"""Bytes of lines up to which all files are scanned, some seconds; of larger data only the start of some files."""
SLOW = {"csv": 16, "tsv": 16, "json": 16}
"""As how many bytes of lines one of other kinds counts; a compressed one as 4."""
FILES_LOOKED_AT = 32
"""Files of each source, when the data is larger: spread evenly over all."""
READ_ALL = 8 * 2**20
"""Bytes of text up to which all rows are tokenised; it takes about a second per megabyte."""
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Example:
    """One example as the model sees it."""

    origin: str
    """As file:line."""
    input_ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    """Its supervised tokens."""


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source that were read."""

    setting: str
    """As data.train.0."""
    source: Source
    rows: int
    """Rejected ones included."""
    rejected: int


@dataclass(frozen=True)
class Preview:
    """One pass over the rows of a split."""

    limits: Limits
    rows: int
    """Rejected ones included."""
    packs: int
    tokens: int
    supervised: int
    fill: float
    """Tokens / (packs * max_length)."""
    read: int
    """Rows that were read: all, if `exact`."""
    rejected: dict[str, int]
    """Of the rows that were read, by reason."""
    exact: bool
    """False: rows, packs, tokens and supervised are estimates."""
    lengths: tuple[int, ...]
    """Tokens of an example, at the QUANTILES of the examples."""
    sources: tuple[SourceRows, ...]
    examples: tuple[Example, ...]
    """The first that is trained on, and the next from another source if there is one."""
    digests: NDArray[np.uint64]
    """Of the rows that were read."""
    some_packs: tuple[Pack, ...]
    """The first sequences."""


def describe(config: Config, spec: TokenizerSpec, split: Split = "train", limit: int = 2000) -> Preview:
    """Preview a split, of large data from about `limit` rows; raises UserError as the preparation would.

    Of large data too many rejected rows are an error if they are too many of those that were read.
    """
    look = _Look(config, split)
    plan = make_plan(config, spec, split, looking(config.run.storage, look, read_as))
    whole = look.complete and plan.shards.pieces.bytes <= READ_ALL
    part, drawn = (plan, 0) if whole else sample(plan, limit)
    exact = look.complete and whole
    limits = Limits.of(config, split)
    if split == "train" or config.data.eval:
        for line in manifest.form_lines(plan):
            logger.info(line)
    made, totals = _made(part, limits, exact)
    for line in manifest.lines(totals.notes):
        logger.info(f"of the rows that were read, {line}")
    scale = 1.0 if exact else look.rows * plan.kept_share / max(drawn or plan.rows, 1.0)
    return _preview(part, limits, made, totals, exact, scale)


def _made(plan: Plan, limits: Limits, exact: bool) -> tuple[list[shards.Shard], Totals]:
    """The shards of the plan, in memory, judged as `prepare.make` judges them."""
    totals, made = Totals(plan, RejectedRows(plan)), []
    for number in range(len(plan.shards)):
        made.append(shards.build(plan, plan.part(number)))
        totals.add(made[-1].sidecar(b""), fresh=True)
        if totals.hopeless(limits):
            break
    try:
        totals.check(limits)
    except UserError as error:
        raise error if exact else UserError(f"{error} (of the rows that a dry run reads of so much data)") from None
    return made, totals


def _preview(
    plan: Plan, limits: Limits, made: Sequence[shards.Shard], totals: Totals, exact: bool, scale: float
) -> Preview:
    total = totals.total
    lengths = [len(example.ids) for shard in made for example in shard.examples]
    first = next(shard for shard in made if shard.packs)  # the first of all may have no held-out row
    return Preview(
        limits=limits,
        rows=round(total["rows"] * scale),
        packs=round(total["packs"] * scale),
        tokens=round(total["tokens"] * scale),
        supervised=round(total["supervised"] * scale),
        fill=total["tokens"] / (total["packs"] * plan.max_length),
        read=total["rows"],
        rejected=dict(sorted(totals.reasons.items())),
        exact=exact,
        lengths=tuple(int(n) for n in np.quantile(lengths, QUANTILES, method="closest_observation")),
        sources=tuple(_source(limits, plan, made, number) for number in range(len(plan.sources))),
        examples=_examples(plan, first),
        digests=np.frombuffer(b"".join(digest for shard in made for digest in shard.digests), dtype=np.uint64),
        some_packs=tuple(_pack(first, members) for members in first.packs[:8]),
    )


def _source(limits: Limits, plan: Plan, made: Sequence[shards.Shard], number: int) -> SourceRows:
    rejected = sum(entry["source"] == number for shard in made for entry in shard.rejected)
    rows = sum(shard.rows_of[number] for shard in made)
    return SourceRows(f"{limits.setting}.{number}", plan.sources[number], rows, rejected)


def _examples(plan: Plan, shard: shards.Shard) -> tuple[Example, ...]:
    first, *rest = (number for members in shard.packs for number in members)

    def source(number: int) -> int:
        return plan.files[shard.origins[number] >> manifest.PLACE_BITS].source

    others = [number for number in rest if source(number) != source(first)] or rest
    files, found = [each.file.uri for each in plan.files], list[Example]()
    for number in (first, *others[:1]):
        tokens = shard.examples[number]
        found.append(Example(manifest.place_name(files, shard.origins[number]), tokens.ids, tokens.supervised))
    return tuple(found)


def _pack(shard: shards.Shard, members: Sequence[int]) -> Pack:
    chosen = [shard.examples[number] for number in members]
    ids = np.concatenate([example.ids for example in chosen])
    supervised = np.concatenate([example.supervised for example in chosen])
    return Pack(ids, supervised, tuple(len(example.ids) for example in chosen))


class _Look:
    """Scans small data as a whole, and looks at the start of a few files of large data."""

    def __init__(self, config: Config, split: Split) -> None:
        self._storage = config.run.storage
        self._sources = sources_of(config, split)[1]
        self.complete = True
        self.rows = 0.0
        """Rows of an epoch, weights included."""

    def __call__(self, sources: Sequence[Sequence[File]]) -> list[list[FileScan]]:
        cost = (file.size * SLOW.get(file.kind, 4 if file.compression else 1) for files in sources for file in files)
        self.complete = sum(cost) <= SCAN_ALL
        scans = [self._source(files) for files in sources]
        for source, files, found in zip(self._sources, sources, scans, strict=True):
            seen = total_bytes(files if self.complete else _spread(files))
            self.rows += source.weight * sum(each.rows for each in found) * total_bytes(files) / max(seen, 1)
        return scans

    def _source(self, files: Sequence[File]) -> list[FileScan]:
        if self.complete:
            return [scan(file, self._storage, keep=False) for file in files]
        unseen, seen = FileScan("", 0, (), Units.of(())), set(_spread(files))
        return [head(file) if file in seen else unseen for file in files]


def _spread(files: Sequence[File]) -> list[File]:
    """Some of the files, from the first to the last."""
    chosen = np.linspace(0, len(files) - 1, min(FILES_LOOKED_AT, len(files))).round()
    return [files[int(number)] for number in chosen]
