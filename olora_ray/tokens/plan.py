"""Plan of a token store, made before a row is tokenised: which units, in which order, in which shard.

A shard is a fixed list of units, so any process can make any shard, in any order, with the same bytes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from olora_ray.common.digests import digest_json
from olora_ray.common.errors import UserError
from olora_ray.config.evaluation import AnyConfig
from olora_ray.config.schema import Source
from olora_ray.data.form import digest_inputs
from olora_ray.data.reader import Unit
from olora_ray.data.scan import FileScan
from olora_ray.data.sources import File, list_files
from olora_ray.data.tokenize import TokenizerSpec
from olora_ray.tokens import rng

VERSION = 1
"""Changes whenever the same input would give other shards; the next two do so for some inputs only."""
READ_ANEW = {"csv": "csv 2"}
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


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the plan: a unit, and what of it is taken."""

    file: int
    """Index into `Plan.files`."""
    unit: Unit
    turn: int
    """Number of the pass over the source."""
    share: float
    """Of the rows; below 1 they are drawn by a hash of their place, see draws.py."""


@dataclass(frozen=True)
class PlannedFile:
    """A file and how its rows are read."""

    file: File
    source: int
    sha256: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that the shards of a store follow from."""

    split: Split
    spec: TokenizerSpec
    sources: tuple[Source, ...]
    files: tuple[PlannedFile, ...]
    shards: tuple[tuple[Piece, ...], ...]
    max_length: int
    packing: bool
    seed: int
    eval_fraction: float | None
    last_turn_only: bool = False
    draw: str = ""
    """Digest of all files: other data, as every night, draw other rows where a weight is not whole."""

    @property
    def rows(self) -> float:
        """Rows that will be read, about: blank lines and what the draws choose are not known yet."""
        return sum(_rows(piece) for shard in self.shards for piece in shard) * self.kept_share

    @property
    def kept_share(self) -> float:
        """The share of the rows that belongs to this split."""
        if self.eval_fraction is None:
            return 1.0
        return self.eval_fraction if self.split == "eval" else 1.0 - self.eval_fraction

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


def make_plan(config: AnyConfig, spec: TokenizerSpec, split: Split, scan: Scanner) -> Plan:
    """List and scan the files of a split and lay out the shards; raises UserError for missing or empty sources."""
    setting, sources = sources_of(config, split)
    if not sources:
        raise UserError(f"{setting}: no source is set")
    listed = [list_files(source, f"{setting}.{n}", config.run.storage) for n, source in enumerate(sources)]
    files: list[PlannedFile] = []
    units: list[list[tuple[int, Unit]]] = []
    for number, (found, scans) in enumerate(zip(listed, scan(listed), strict=True)):
        units.append([])
        for file, result in zip(found, scans, strict=True):
            units[-1].extend((len(files), unit) for unit in result.units)
            files.append(PlannedFile(file, number, result.sha256, result.columns))
        if not units[-1]:
            raise UserError(f"{setting}.{number}.path: {sources[number].path} is empty: it has no rows")
    pieces = _mixed(sources, units, config.run.seed) if split == "train" else _in_turn(sources, units)
    return Plan(
        split=split,
        spec=spec,
        sources=sources,
        files=tuple(files),
        shards=tuple(_shards(pieces)),
        max_length=config.data.max_length,
        packing=spec.packing(config.data.packing),
        seed=config.run.seed,
        eval_fraction=config.data.eval_fraction,
        last_turn_only=config.data.last_turn_only,
        draw=digest_json([each.sha256 for each in files], length=16) if split == "train" else "",
    )


def _turns(weight: float) -> list[float]:
    """The share of the rows in each pass: 2.5 -> 1, 1, 0.5."""
    whole = int(weight)
    rest = weight - whole
    return [1.0] * whole + ([rest] if rest > 1e-9 or not whole else [])


def _pieces(units: list[tuple[int, Unit]], weight: float, seed: tuple[int, int] | None) -> list[Piece]:
    """The units of a source as often as its weight says; each turn in an order of its own, if there is a seed."""
    pieces: list[Piece] = []
    for turn, share in enumerate(_turns(weight)):
        order = range(len(units)) if seed is None else rng.permutation(len(units), rng.key("units", *seed, turn))
        pieces.extend(Piece(*units[index], turn, share) for index in order)
    return pieces


def _in_turn(sources: Sequence[Source], units: list[list[tuple[int, Unit]]]) -> list[Piece]:
    """The sources one after the other, in the order of their files."""
    return [
        piece for source, found in zip(sources, units, strict=True) for piece in _pieces(found, source.weight, None)
    ]


def _mixed(sources: Sequence[Source], units: list[list[tuple[int, Unit]]], seed: int) -> list[Piece]:
    """Each source shuffled, then all interleaved so that each is spread evenly over the whole."""
    spread: list[tuple[float, int, Piece]] = []
    for number, (source, found) in enumerate(zip(sources, units, strict=True)):
        pieces = _pieces(found, source.weight, (seed, number))
        rows = np.array([_rows(piece) for piece in pieces])
        middles = (np.cumsum(rows) - rows / 2) / rows.sum()
        spread.extend((middle, number, piece) for middle, piece in zip(middles.tolist(), pieces, strict=True))
    spread.sort(key=lambda entry: entry[:2])
    return [piece for _, _, piece in spread]


def _rows(piece: Piece) -> float:
    return piece.unit.rows * piece.share


def _shards(pieces: list[Piece]) -> list[tuple[Piece, ...]]:
    """Consecutive pieces, cut by rows and bytes into shards of about equal size."""
    rows = np.array([_rows(piece) for piece in pieces])
    size = np.array([piece.unit.size * piece.share for piece in pieces])
    wanted = float(np.clip(rows.sum() / SHARDS_WANTED, *SHARD_ROWS))
    count = max(1, round(float(max(rows.sum() / wanted, size.sum() / SHARD_BYTES))))
    cost = np.maximum(rows / rows.sum(), size / max(size.sum(), 1.0))
    shard = np.minimum((np.cumsum(cost) - cost / 2) / cost.sum() * count, count - 1).astype(int)
    cuts = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(pieces)]
    return [tuple(pieces[low:high]) for low, high in itertools.pairwise(cuts)]


def sample(plan: Plan, limit: int) -> Plan:
    """The plan cut down to about `limit` rows from its front, as one shard."""
    kept: list[Piece] = []
    rows = 0.0
    for shard in plan.shards:
        for piece in shard:
            if rows < limit:
                kept.append(piece)
                rows += _rows(piece) * plan.kept_share
    return dataclasses.replace(plan, shards=(tuple(kept),))
