"""Plan of a token store, made before a row is tokenised: which units, in which order, in which shard.

A shard is a fixed list of units, so any process can make any shard, in any order, with the same bytes.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from olora_ray.common import malloc
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_json
from olora_ray.config.schema import AnyConfig, Source
from olora_ray.data.reader import FileScan, Units
from olora_ray.data.sources import File, list_files
from olora_ray.data.tokenize import digest_inputs
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens import layout
from olora_ray.tokens.layout import Piece, Pieces, Shards

logger = logging.getLogger(__name__)

VERSION = 1
"""Changes whenever the same input would give other shards; the next two do so for some inputs only."""
READ_ANEW = {"csv": "csv 3", "tsv": "tsv 2"}
"""Kinds of files that once were read in another way, and what they are called in the digest since."""
DRAWN_BY = "hash"
"""How rows are chosen where a weight is not whole."""

SHARD_ROWS = (4096, 32768)
"""Rows of a shard, at least and at most: it is shuffled and packed as a whole."""
SHARDS_WANTED = 512
SHARD_BYTES = 64 * 2**20

Split = Literal["train", "eval"]
Scanner = Callable[[Sequence[Sequence[File]]], list[list[FileScan]]]
"""Scans the files of each source."""
Found = tuple[list[list[File]], list[list[FileScan]]]
"""The files of each source, and their scans."""
Look = Callable[[str, Sequence[Source]], Found]
"""Lists and scans the files of sources; the text is the setting that holds them."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file and how its rows are read."""

    file: File
    source: int
    sha256: str
    columns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How rows become sequences: what all shards of a store have in common."""

    split: Split
    spec: TokenizerSpec
    sources: tuple[Source, ...]
    max_length: int
    packing: bool
    seed: int
    eval_fraction: float | None
    last_turn_only: bool = False
    draw: str = ""
    """Digest of all files: other data, as every night, draw other rows where a weight is not whole."""


@dataclass(frozen=True)
class Part:
    """One shard of a plan and the files that it reads: all that a task needs beside the rules."""

    number: int
    """Of the shard."""
    pieces: Pieces
    files: Mapping[int, PlannedFile]
    """By their numbers in the plan."""


@dataclass(frozen=True, kw_only=True)
class Plan(Rules):
    """Everything that the shards of a store follow from."""

    files: tuple[PlannedFile, ...]
    shards: Shards

    def part(self, number: int) -> Part:
        """What one shard is made of."""
        pieces = self.shards[number].compact()
        return Part(number, pieces, {file: self.files[file] for file in np.unique(pieces.files).tolist()})

    def rules(self) -> Rules:
        """The plan without its files and shards."""
        return Rules(**{each.name: getattr(self, each.name) for each in dataclasses.fields(Rules)})

    @cached_property
    def rows(self) -> float:
        """Rows that will be read, about: blank lines and what the draws choose are not known yet."""
        return float(self.shards.pieces.rows.sum()) * self.kept_share

    @property
    def file_rows(self) -> int:
        """Rows of all files, held-out rows and blank lines included, whatever the weights of their sources."""
        return int(self.shards.pieces.units["rows"].sum())

    @property
    def kept_share(self) -> float:
        """The share of the rows that belongs to this split."""
        if self.eval_fraction is None:
            return 1.0
        return self.eval_fraction if self.split == "eval" else 1.0 - self.eval_fraction

    def contents(self) -> dict[str, str]:
        """The file of each content that was looked at, by its digest."""
        return {each.sha256: each.file.uri for each in self.files if each.sha256}

    def inputs(self) -> dict[str, object]:
        """The inputs of the store's digest: contents, no paths."""
        return {
            "version": VERSION,
            "split": self.split,
            "sources": [
                {
                    "format": source.format,
                    "fields": dict(sorted(source.fields.items())),
                    "weight": source.weight,
                    **({} if source.weight == int(source.weight) else {"drawn_by": DRAWN_BY}),
                    "files": [
                        [READ_ANEW.get(each.file.kind, each.file.kind), each.sha256]
                        for each in self.files
                        if each.source == number
                    ],
                    **digest_inputs(
                        source, self.spec, {each.file.kind for each in self.files if each.source == number}
                    ),
                }
                for number, source in enumerate(self.sources)
            ],
            "tokenizer": self.spec.digest,
            "max_length": self.max_length,
            "packing": self.packing,
            "seed": self.seed if self.split == "train" or self.eval_fraction is not None else None,
            "eval_fraction": self.eval_fraction,
            **({"last_turn_only": True} if self.last_turn_only else {}),
        }

    def digest(self) -> str:
        """Name of the store."""
        return digest_json(self.inputs(), length=32)


def sources_of(config: AnyConfig, split: Split) -> tuple[str, tuple[Source, ...]]:
    """The sources of a split and the setting that holds them."""
    if split == "train" or config.data.eval_fraction is not None:
        return "data.train", config.data.train
    return "data.eval", config.data.eval


def looking(storage_root: str, scan: Scanner) -> Look:
    """A look at the files as they are now."""

    def look(setting: str, sources: Sequence[Source]) -> Found:
        listed = [list_files(source, f"{setting}.{n}", storage_root) for n, source in enumerate(sources)]
        return listed, scan(listed)

    return look


def once(look: Look) -> Look:
    """The same look for both splits of the same sources: a file that grows meanwhile would be split in two ways."""
    kept: dict[str, Found] = {}

    def kept_look(setting: str, sources: Sequence[Source]) -> Found:
        if setting in kept:
            return kept.pop(setting)
        kept[setting] = look(setting, sources)
        return kept[setting]

    return kept_look


def make_plan(config: AnyConfig, spec: TokenizerSpec, split: Split, look: Look) -> Plan:
    """Look at the files of a split and lay out the shards; raises UserError for missing or empty sources."""
    setting, sources = sources_of(config, split)
    if not sources:
        raise UserError(f"{setting}: no source is set")
    files, units, borders = _planned(*look(setting, sources))
    for number, (low, high) in enumerate(itertools.pairwise(borders)):
        if low == high:
            raise UserError(f"{setting}.{number}.path: {sources[number].path} is empty: it has no rows")
    table, weights = layout.joined(units), [source.weight for source in sources]
    malloc.give_back()  # of a billion rows, the scans of the files take as much as all the rest
    if split == "train":
        pieces = layout.mixed(table, borders, weights, config.run.seed)
    else:
        pieces = layout.in_turn(table, borders, weights)
    shards = _shards(pieces)
    malloc.give_back()
    return Plan(
        split=split,
        spec=spec,
        sources=sources,
        files=tuple(files),
        shards=shards,
        max_length=config.data.max_length,
        packing=spec.packing(config.data.packing),
        seed=config.run.seed,
        eval_fraction=config.data.eval_fraction,
        last_turn_only=config.data.last_turn_only,
        draw=digest_json([each.sha256 for each in files], length=16) if split == "train" else "",
    )


def _planned(
    listed: Sequence[Sequence[File]], scanned: Sequence[Sequence[FileScan]]
) -> tuple[list[PlannedFile], list[Units], list[int]]:
    """The files of all sources, the units of each, and how many units come before each source, and in all."""
    files, units, borders = list[PlannedFile](), list[Units](), [0]
    for number, (found, scans) in enumerate(zip(listed, scanned, strict=True)):
        files += [PlannedFile(file, number, each.sha256, each.columns) for file, each in zip(found, scans, strict=True)]
        units += [each.units for each in scans]
        borders.append(borders[-1] + sum(len(each.units) for each in scans))
    return files, units, borders


def _shards(pieces: Pieces) -> Shards:
    """Consecutive pieces, cut by rows and bytes into shards of about equal size."""
    rows, size = pieces.rows, pieces.sizes
    all_rows, all_bytes = rows.sum(), size.sum()
    wanted = float(np.clip(all_rows / SHARDS_WANTED, *SHARD_ROWS))
    count = max(1, round(float(max(all_rows / wanted, all_bytes / SHARD_BYTES))))
    # In place: of a billion rows each array takes 31 MB.
    rows /= all_rows
    size /= max(all_bytes, 1.0)
    cost = np.maximum(rows, size, out=rows)
    del size
    middle, whole = np.cumsum(cost), cost.sum()
    cost /= 2
    middle -= cost
    middle /= whole
    middle *= count
    shard = np.minimum(middle, count - 1, out=middle).astype(int)
    return Shards(pieces, np.array([0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(pieces)]))


def sample(plan: Plan, limit: int) -> Plan:
    """The plan cut down to about `limit` rows from its front, as one shard."""
    pieces = plan.shards.pieces
    before = (np.cumsum(pieces.rows) - pieces.rows) * plan.kept_share
    kept = pieces[: int(np.searchsorted(before, limit))]
    return dataclasses.replace(plan, shards=Shards(kept, np.array([0, len(kept)])))


# Draws of rows: which are held out, and which are used where a weight is not whole.


LIKELY = 50
"""Rows to be expected from which on no draw leaves none of them."""


def taken(rules: Rules, planned: PlannedFile, piece: Piece, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The rows of a piece of a file that belong to the split and are used in its turn.

    Whether a row is held out depends on the seed, the content of its file and its place there. Where a weight is
    not whole, each row is drawn by itself, by a hash of its place: never by a rule that a file's layout could meet.
    """
    keep = np.ones(len(places), dtype=bool)
    if rules.eval_fraction is not None:
        held_out = layout.bernoulli_mask(rules.eval_fraction, layout.key("eval", rules.seed, planned.sha256), places)
        keep = held_out if rules.split == "eval" else ~held_out
    if piece.share < 1.0:
        keep = keep & layout.bernoulli_mask(piece.share, _draw_key(rules, planned.sha256, piece), places)
    return keep


def _draw_key(rules: Rules, sha256: str, piece: Piece) -> int:
    if rules.split == "eval":
        # The same held-out rows with every seed, and whatever else is there: results are compared over time.
        return layout.key("share", sha256, piece.turn)
    return layout.key("share", rules.seed, rules.draw, piece.file, sha256, piece.turn)


def warn_of_empty(plan: Plan, setting: str) -> None:
    """Say so where the weight of a small source leaves nothing of it, which could be missed among other sources."""
    files = np.array([each.source for each in plan.files])
    for number, source in enumerate(plan.sources):
        if source.weight >= 1.0:
            continue
        pieces = plan.shards.pieces
        pieces = pieces[np.flatnonzero(files[pieces.files] == number)]
        rows = int(pieces.units["rows"][pieces.unit].sum(dtype=np.int64))
        if rows * source.weight * plan.kept_share < LIKELY and not any(_count(plan, piece) for piece in pieces):
            logger.warning(
                f"{setting}.{number}.weight: {source.weight:g} leaves no row of the {rows:,} of {source.path}"
                f" in {plan.split}"
            )


def _count(plan: Plan, piece: Piece) -> int:
    """The places of a piece that are taken; what is there is known once they are read."""
    first = piece.unit.first
    places = np.arange(first, first + piece.unit.rows, dtype=np.int64)
    return int(taken(plan, plan.files[piece.file], piece, places).sum())
