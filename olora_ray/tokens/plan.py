"""Plan of a token store, computed before a row is tokenised: which units, in which order, in which shard.

A shard is a fixed list of units, so any process can build any shard, in any order, with the same bytes.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_json
from olora_ray.config.decided import AnyData
from olora_ray.config.schema import AnyConfig
from olora_ray.config.section import Source
from olora_ray.data.formats import format_named
from olora_ray.data.reader import FileScan, Table, Unit, Units, read_unit
from olora_ray.data.sources import File, list_files
from olora_ray.data.tokenize import digest_inputs
from olora_ray.data.tokenizer_spec import TokenizerSpec


@dataclass(frozen=True)
class Counts:
    """The size of some examples, in the units over which the mean of a loss can be taken."""

    tokens: int = 0
    examples: int = 0
    supervised: int = 0
    """Number of supervised ones among the tokens."""
    pairs: int = 0
    """Number of pairs among the examples."""
    chosen: int = 0
    """Number of supervised tokens of chosen answers."""
    rejected: int = 0
    """Number of supervised tokens of rejected answers, and of those with a thumb down."""
    ups: int = 0
    """Number of examples with a thumb up."""
    downs: int = 0
    """Number of examples with a thumb down."""
    praised: int = 0
    """Number of supervised tokens of answers with a thumb up."""

    @property
    def plain(self) -> int:
        """Number of supervised tokens of examples without feedback."""
        return self.right - self.chosen - self.praised

    @property
    def right(self) -> int:
        """Number of supervised tokens of answers that a model should give."""
        return self.supervised - self.rejected

    def __add__(self, other: "Counts") -> "Counts":
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*[ours + theirs for ours, theirs in both])


@dataclass(frozen=True)
class Pack:
    """One sequence of a store: several examples side by side that do not see each other."""

    input_ids: NDArray[np.int32]
    """(tokens,)"""
    supervised: NDArray[np.bool_]
    """(tokens,) True for tokens that count in the loss; never the first of a segment."""
    segments: tuple[int, ...]
    """Tokens of each segment; they sum up to the length of the sequence. A segment is an example, or an answer of a
    pair."""
    roles: tuple[int, ...] = ()
    """A number for each segment: 0, UP, DOWN, or CHOSEN and, for the next one, REJECTED. Empty without feedback."""
    reference: tuple[float, ...] = ()
    """Loss of each segment before the first step, summed over its supervised tokens; empty if it is not known."""

    def supervised_counts(self) -> list[int]:
        """Return the number of supervised tokens of each segment."""
        parts = np.split(self.supervised, np.cumsum(self.segments)[:-1])
        return [int(part.sum()) for part in parts]

    def examples(self) -> list[Counts]:
        """Return the counts of each example."""
        counts: list[Counts] = []
        roles = self.roles or (0,) * len(self.segments)
        for tokens, supervised, role in zip(
            self.segments, self.supervised_counts(), roles, strict=True
        ):
            if role == REJECTED:
                counts[-1] += Counts(tokens, supervised=supervised, rejected=supervised)
            elif role == CHOSEN:
                counts.append(Counts(tokens, 1, supervised, pairs=1, chosen=supervised))
            elif role == UP:
                counts.append(Counts(tokens, 1, supervised, ups=1, praised=supervised))
            elif role == DOWN:
                counts.append(Counts(tokens, 1, supervised, downs=1, rejected=supervised))
            else:
                counts.append(Counts(tokens, 1, supervised))
        return counts


CHOSEN, REJECTED, UP, DOWN = 1, 2, 3, 4
"""Roles of segments (`Pack.roles`): the two answers of a pair, and an answer with a thumb up or down."""
ROLES = "roles"
"""Column of the roles of segments, which only shards of stores with pairs have."""


# Pseudo-random numbers as functions of a key and a counter: the same on every machine, with every numpy and Ray.


Words = NDArray[np.uint64]
Indices = NDArray[np.int64]


def key(*parts: object) -> int:
    """Return a 64-bit key of values that have a stable `str`."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "little")


def mix(seed: int, counters: Words) -> Words:
    """Return one uniform 64-bit word per counter (splitmix64)."""
    word = (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def permutation(size: int, seed: int) -> Indices:
    """Return a permutation of range(size) that depends only on the seed."""
    return np.argsort(mix(seed, np.arange(size, dtype=np.uint64)), kind="stable").astype(np.int64)


def bernoulli_mask(share: float, seed: int, counters: Indices) -> NDArray[np.bool_]:
    """Return the mask of a random `share` of the counters; each entry depends only on its counter and the seed."""
    return mix(seed, counters.astype(np.uint64)) < np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def permute_at(positions: Indices, size: int, seed: int) -> Indices:
    """Return the elements at `positions` of a permutation of range(size), without computing all of it.

    A Feistel network permutes the next power of four; a result outside the range is permuted again until it is
    inside, which keeps it a permutation of the range.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    result = _feistel(positions.astype(np.uint64), half, seed)
    while (outside := result >= np.uint64(size)).any():
        result[outside] = _feistel(result[outside], half, seed)
    return result.astype(np.int64)


def _feistel(words: Words, half: np.uint64, seed: int) -> Words:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left = words >> half
    right = words & mask
    for turn in range(
        8
    ):  # four rounds make a pseudo-random permutation, and four more cost nothing
        left, right = right, left ^ (mix(key(seed, turn), right) & mask)
    return (left << half) | right


# Layout: the units of each shard, as arrays. A billion rows are four million units; a unit takes 40 bytes, and each use
# of it 8 more. `Piece` objects are created for one shard at a time.


# The part of a unit to use: number of the pass over its source (in a `sample` -1 - the rows before), and share of the
# rows.
Repeat = tuple[int, float]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the plan: a unit, and the part of it to use."""

    file: int
    """Index into `Plan.files`."""
    unit: Unit
    turn: int
    """Number of the pass over the source."""
    share: float
    """Share of the rows that is used; below 1 the rows are drawn (`taken`)."""


class Pieces(Sequence[Piece]):
    def __init__(
        self,
        units: Table,
        unit: NDArray[np.uint32],
        take: NDArray[np.uint32],
        takes: Sequence[Repeat],
    ) -> None:
        """Store the pieces: piece k is `units[unit[k]]`, of which `takes[take[k]]` is used."""
        self.units = units
        self.unit = unit
        self.take = take
        self.takes = tuple(takes)

    @property
    def files(self) -> NDArray[np.uint32]:
        """(pieces,) number of the file of each."""
        return self.units["file"][self.unit]

    @property
    def rows(self) -> Floats:
        """(pieces,) approximate rows that are used of each."""
        return self._taken("rows")

    @property
    def sizes(self) -> Floats:
        """(pieces,) approximate bytes that are used of each."""
        return self._taken("size")

    @property
    def bytes(self) -> int:
        """Bytes to read, counted once per piece."""
        return int(self.units["size"][self.unit].sum(dtype=np.int64))

    def compact(self) -> "Pieces":
        used, unit = np.unique(self.unit, return_inverse=True)
        return Pieces(self.units[used], unit.astype(np.uint32), self.take, self.takes)

    def _taken(self, field: str) -> Floats:
        shares = np.array([share for _, share in self.takes])
        return self.units[field][self.unit] * shares[self.take]  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.unit)

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: "slice | NDArray[Any]") -> "Pieces": ...
    def __getitem__(self, index: "int | slice | NDArray[Any]") -> "Piece | Pieces":
        if isinstance(index, slice | np.ndarray):
            return Pieces(self.units, self.unit[index], self.take[index], self.takes)
        number = int(self.unit[index])
        return Piece(
            int(self.units["file"][number]),
            Units(self.units)[number],
            *self.takes[self.take[index]],
        )


def repeats(weight: float) -> list[float]:
    """Return the share of the rows in each pass, for weight 2.5: 1, 1, 0.5."""
    whole = int(weight)
    rest = weight - whole
    shares = [1.0] * whole
    if rest > 1e-9 or not whole:
        shares.append(rest)
    return shares


def in_turn(units: Table, borders: Sequence[int], weights: Sequence[float]) -> Pieces:
    """Return the sources one after the other, in the order of their files.

    Source k has the units `borders[k]` to `borders[k + 1]`, and is used as often as `weights[k]` says.
    """
    return _together(
        units, [_source(units, low, high, w, None) for low, high, w in _each(borders, weights)]
    )


def mixed(units: Table, borders: Sequence[int], weights: Sequence[float], seed: int) -> Pieces:
    """Return the sources interleaved, each spread over the whole, and shuffled differently in each pass."""
    sources = [
        _source(units, low, high, weight, (seed, number))
        for number, (low, high, weight) in enumerate(_each(borders, weights))
    ]
    middles = []
    for pieces in sources:
        rows = pieces.rows
        # From 0 to 1, so that sources of different sizes can be interleaved evenly.
        middles.append((np.cumsum(rows) - rows / 2) / rows.sum())
    numbers = np.repeat(
        np.arange(len(sources), dtype=np.uint32), [len(pieces) for pieces in sources]
    )
    return _together(units, sources)[np.lexsort((numbers, np.concatenate(middles)))]


def _each(borders: Sequence[int], weights: Sequence[float]) -> list[tuple[int, int, float]]:
    return [
        (low, high, weight)
        for (low, high), weight in zip(itertools.pairwise(borders), weights, strict=True)
    ]


def _source(
    units: Table, low: int, high: int, weight: float, seed: tuple[int, int] | None
) -> Pieces:
    takes = list(enumerate(repeats(weight)))
    count = high - low
    orders = []
    for turn, _ in takes:
        order = np.arange(count, dtype=np.uint32)
        if seed is not None:
            order = permutation(count, key("units", *seed, turn)).astype(np.uint32)
        orders.append(order + np.uint32(low))
    return Pieces(
        units,
        np.concatenate(orders),
        np.repeat(np.arange(len(takes), dtype=np.uint32), count),
        takes,
    )


def _together(units: Table, sources: Sequence[Pieces]) -> Pieces:
    takes: list[Repeat] = []
    numbers = []
    for pieces in sources:
        numbers.append(pieces.take + np.uint32(len(takes)))
        takes += pieces.takes
    return Pieces(
        units, np.concatenate([pieces.unit for pieces in sources]), np.concatenate(numbers), takes
    )


# The plan: inputs of a store, its digest, and the pieces of its shards.


# Raised whenever the same input would give other shards.
VERSION = 2
# Rows of a shard, at least and at most: it is shuffled and packed at once.
SHARD_ROWS = (4096, 32768)
Split = Literal["train", "eval"]
# Scans the files of each source.
Scanner = Callable[[Sequence[Sequence[File]]], list[list[FileScan]]]
# The sources with their formats, the files of each, and their scans.
Found = tuple[tuple[Source, ...], list[list[File]], list[list[FileScan]]]
# Lists and scans the files of sources; the text is the setting that holds them.
Look = Callable[[str, Sequence[Source]], Found]


# Digests of the tokens of rows.
RowDigests = NDArray[np.uint64]
NO_ROWS: RowDigests = np.zeros(0, np.uint64)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    file: File
    source: int
    sha256: str
    columns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules by which rows become sequences: what all shards of a store have in common."""

    split: Split
    spec: TokenizerSpec
    sources: tuple[Source, ...]
    max_length: int
    packing: bool
    seed: int
    eval_fraction: float | None
    shares: Mapping[int, float] = field(default_factory=dict)
    """Larger shares than `eval_fraction`, for the sources that would have no held-out row."""
    last_turn_only: bool = False
    too_long: str = "reject"
    draw: str = ""
    """Digest of all files: other data, as every night, draws other rows if a weight is not an integer."""
    held_out: RowDigests = field(default_factory=lambda: NO_ROWS, compare=False, repr=False)
    """The rows that eval_fraction holds out, sorted; the training leaves out their copies. The other rules decide
    them."""

    def taken(self, planned: PlannedFile, piece: Piece) -> NDArray[np.bool_]:
        """Return the mask of the rows of a piece that belong to the split and are used in its turn, (rows,).

        Whether a row is held out depends on the seed, the content of its file and its position there. If a weight is
        not an integer, each row is drawn by a hash of its position, never by a rule that could match the layout of a
        file.
        """
        positions = np.arange(piece.unit.first, piece.unit.first + piece.unit.rows, dtype=np.int64)
        keep = np.ones(len(positions), dtype=bool)
        if self.eval_fraction is not None:
            share = self.shares.get(planned.source, self.eval_fraction)
            held_out = held_out_mask(share, self.seed, planned.sha256, positions)
            keep = held_out if self.split == "eval" else ~held_out
        if piece.turn < 0:
            # A sample has one random row of each run of so many rows: independent draws might take too many long rows.
            low = (positions - piece.unit.first - 1 - piece.turn) * piece.share
            points = [
                whole + mix(0, whole.astype(np.uint64)) / 2.0**64
                for whole in (np.floor(low), np.floor(low) + 1)
            ]
            keep = keep & np.any(
                [(low <= point) & (point < low + piece.share) for point in points], axis=0
            )
        elif piece.share < 1.0:
            drawn = key("share", self.seed, self.draw, piece.file, planned.sha256, piece.turn)
            if self.split == "eval":
                # The held-out rows depend neither on the seed nor on other files: results are compared over time.
                drawn = key("share", planned.sha256, piece.turn)
            keep = keep & bernoulli_mask(piece.share, drawn, positions)
        return keep


def held_out_mask(share: float, seed: int, sha256: str, positions: Indices) -> NDArray[np.bool_]:
    """Return the mask of the rows that `data.eval_fraction` holds out of a file, by the digest of its content."""
    return bernoulli_mask(share, key("eval", seed, sha256), positions)


@dataclass(frozen=True)
class Part:
    """One shard of a plan and the files that it reads: all that a task needs beside the rules."""

    number: int
    """Number of the shard."""
    pieces: Pieces
    files: Mapping[int, PlannedFile]
    """By their numbers in the plan."""


@dataclass(frozen=True, kw_only=True)
class Plan(Rules):
    """Everything that determines the shards of a store."""

    files: tuple[PlannedFile, ...]
    pieces: Pieces
    """The pieces of all shards, in their order."""
    shards: tuple[Pieces, ...]

    def part(self, number: int) -> Part:
        pieces = self.shards[number].compact()
        return Part(
            number, pieces, {file: self.files[file] for file in np.unique(pieces.files).tolist()}
        )

    def rules(self) -> Rules:
        return Rules(**{each.name: getattr(self, each.name) for each in dataclasses.fields(Rules)})

    @cached_property
    def rows(self) -> float:
        """Approximate number of rows to read: blank lines and the results of draws are not known yet."""
        return float(self.pieces.rows.sum()) * self.kept_share

    @property
    def file_rows(self) -> int:
        """Rows of all files, held-out rows and blank lines included, without regard to the weights of sources."""
        return int(self.pieces.units["rows"].sum())

    @property
    def kept_share(self) -> float:
        """Share of the rows that belongs to this split."""
        if self.eval_fraction is None:
            return 1.0
        return self.eval_fraction if self.split == "eval" else 1.0 - self.eval_fraction

    def inputs(self) -> dict[str, object]:
        """Return the inputs of the store's digest: contents, no paths."""
        seeded = self.split == "train" or self.eval_fraction is not None
        inputs: dict[str, object] = {
            "version": VERSION,
            "split": self.split,
            "sources": [self._source_inputs(n, source) for n, source in enumerate(self.sources)],
            "tokenizer": self.spec.digest,
            "max_length": self.max_length,
            "packing": self.packing,
            "seed": self.seed if seeded else None,
            "eval_fraction": self.eval_fraction,
        }
        # Later settings are left out at their defaults, so that older stores keep their digests.
        if self.last_turn_only:
            inputs["last_turn_only"] = True
        if self.too_long != "reject":
            inputs["too_long"] = self.too_long
        if self.shares:
            inputs["shares"] = {str(number): share for number, share in self.shares.items()}
        return inputs

    def _source_inputs(self, number: int, source: Source) -> dict[str, object]:
        files = [each for each in self.files if each.source == number]
        # Without the columns that are left out: they change no token.
        fields = [name for name in format_named(source.format).names if name in source.fields]
        inputs: dict[str, object] = {
            "format": source.format,
            "fields": {name: source.fields[name] for name in fields},
            "weight": source.weight,
        }
        if source.weight != int(source.weight):
            inputs["drawn_by"] = "hash"
        inputs["files"] = [[each.file.form, each.sha256] for each in files]
        return inputs | digest_inputs(source, self.spec, {each.file.kind for each in files})

    def digest(self) -> str:
        return digest_json(self.inputs(), length=32)


def sources_of(config: AnyConfig, split: Split) -> tuple[str, tuple[Source, ...]]:
    if split == "train" or config.data.eval_fraction is not None:
        return "data.train", config.data.train
    return "data.eval", config.data.eval


def looking(
    storage_root: str, scan: Scanner, read_as: Callable[[Source, str, str], Source]
) -> Look:
    """Return a Look at the files as they are now; `read_as` detects the formats that sources do not set."""

    def look(setting: str, sources: Sequence[Source]) -> Found:
        known = tuple(
            read_as(source, f"{setting}.{n}", storage_root) for n, source in enumerate(sources)
        )
        listed = [
            list_files(source, f"{setting}.{n}", storage_root) for n, source in enumerate(known)
        ]
        return known, listed, scan(listed)

    return look


def once(look: Look) -> Look:
    """Return a Look that gives both splits of the same sources the same files.

    Otherwise a file that grows in between would be split in two ways.
    """
    kept: dict[str, Found] = {}

    def kept_look(setting: str, sources: Sequence[Source]) -> Found:
        if setting in kept:
            return kept.pop(setting)
        kept[setting] = look(setting, sources)
        return kept[setting]

    return kept_look


def make_plan(config: AnyData, spec: TokenizerSpec, split: Split, look: Look) -> Plan:
    """List the files of a split and lay out the shards; raise UserError for missing or empty sources."""
    setting, sources = sources_of(config, split)
    if not sources:
        raise UserError(f"{setting}: no source is set")
    files = list[PlannedFile]()
    units = list[Units]()
    borders = [0]
    sources, listed, scanned = look(setting, sources)
    for number, (found, scans) in enumerate(zip(listed, scanned, strict=True)):
        count = 0
        for file, each in zip(found, scans, strict=True):
            files.append(PlannedFile(each.file or file, number, each.sha256, each.columns))
            units.append(each.units)
            count += len(each.units)
        if not count:
            raise UserError(
                f"{setting}.{number}.path: {sources[number].path} is empty: it has no rows"
            )
        borders.append(borders[-1] + count)
    table = Units.joined(units)
    weights = [source.weight for source in sources]
    # For a billion rows these take as much memory as everything else.
    del listed, scanned, found, scans, each, units
    draw = ""
    if split == "train":
        pieces = mixed(table, borders, weights, config.run.seed)
        draw = digest_json([each.sha256 for each in files], length=16)
    else:
        pieces = in_turn(table, borders, weights)
    plan = Plan(
        split=split,
        spec=spec,
        sources=sources,
        files=tuple(files),
        pieces=pieces,
        shards=_shards(pieces),
        max_length=config.data.max_length,
        packing=config.data.packing,
        seed=config.run.seed,
        eval_fraction=config.data.eval_fraction,
        last_turn_only=config.data.last_turn_only,
        too_long=config.data.too_long,
        draw=draw,
    )
    return dataclasses.replace(plan, shares=_shares(plan))


FEWEST = 10
"""Rows of a source from which `data.eval_fraction` holds out one or more of them."""


def _shares(plan: Plan) -> dict[int, float]:
    """Return the shares that hold out one row of each source that has FEWEST rows, but none held out by chance.

    A single source keeps its share, so that a store without rows is an error. So does one of which only a part is
    used: a retraining must not hold out rows on which an earlier one was trained.
    """
    shares: dict[int, float] = {}
    if plan.eval_fraction is None or len(plan.sources) == 1:
        return shares
    table = plan.pieces.units
    source_of = np.array([each.source for each in plan.files])[table["file"]]
    for number, source in enumerate(plan.sources):
        units = table[source_of == number]
        if source.weight >= 1 and not _has_held_out(plan, units):
            share = _share_of_one(plan, units)
            if share is not None:
                shares[number] = share
    return shares


def _has_held_out(plan: Plan, units: Table) -> bool:
    """True if a row of the units is held out; reads those that may have one, until there is one."""
    assert plan.eval_fraction is not None
    for file, unit in zip(units["file"].tolist(), Units(units), strict=True):
        planned = plan.files[file]
        # An unknown digest: a dry run reads only a part of large data, which has enough rows.
        if not planned.sha256:
            return True
        positions = np.arange(unit.first, unit.first + unit.rows, dtype=np.int64)
        mask = held_out_mask(plan.eval_fraction, plan.seed, planned.sha256, positions)
        if mask.any() and np.isin(positions[mask], _positions(planned, unit)).any():
            return True
    return False


def _share_of_one(plan: Plan, units: Table) -> float | None:
    """Return the share that holds out a single row; None if there are fewer rows than FEWEST."""
    words = [NO_ROWS]
    for file, unit in zip(units["file"].tolist(), Units(units), strict=True):
        planned = plan.files[file]
        positions = _positions(planned, unit).astype(np.uint64)
        words.append(mix(key("eval", plan.seed, planned.sha256), positions))
    drawn = np.concatenate(words)
    if len(drawn) < FEWEST:
        return None
    # A little more than the lowest word, because a share has fewer digits.
    return (int(drawn.min()) + 2**12) / 2.0**64


def _positions(planned: PlannedFile, unit: Unit) -> Indices:
    # The positions at which a unit has a row: a line may be empty, or belong to the row before it.
    if planned.file.kind in ("text", "json", "parquet", "arrow"):
        return np.arange(unit.first, unit.first + unit.rows, dtype=np.int64)
    read = read_unit(planned.file, unit, planned.columns, ())
    return np.array([position for position, _ in read], dtype=np.int64)


def _shards(pieces: Pieces) -> tuple[Pieces, ...]:
    rows = pieces.rows
    size = pieces.sizes
    all_rows = rows.sum()
    all_bytes = size.sum()
    wanted = float(np.clip(all_rows / 512, *SHARD_ROWS))
    count = max(1, round(float(max(all_rows / wanted, all_bytes / (64 * 2**20)))))
    rows /= all_rows  # in place: for a billion rows each array takes 31 MB
    size /= max(all_bytes, 1.0)
    cost = np.maximum(rows, size, out=rows)
    del size
    middle = (np.cumsum(cost) - cost / 2) / cost.sum() * count
    shard = np.minimum(middle, count - 1).astype(int)
    cuts = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(pieces)]
    return tuple(pieces[low:high] for low, high in itertools.pairwise(cuts))


def sample(plan: Plan, limit: int) -> tuple[Plan, Floats]:
    """Return the plan cut to about `limit` rows in one shard, and the lines and bytes of these, (sources, 2).

    A file may be sorted: the rows are a few of each of many pieces, which are spread evenly over the files.
    """
    pieces = plan.pieces
    kept_share = plan.kept_share
    # About 64 MB or 131,072 rows are read.
    count = max(8, int(len(pieces) * min(2**26 / max(pieces.bytes, 1), 2**17 / pieces.rows.sum())))
    by_file = np.lexsort((pieces.units["first"][pieces.unit], pieces.files))
    chosen = np.unique(
        np.linspace(0, len(pieces) - 1, min(count, len(pieces))).round().astype(np.int64)
    )
    kept = pieces[by_file[chosen]]
    rows = float(kept.rows.sum()) * kept_share
    size = float(kept.sizes.sum()) * kept_share
    # Fewer rows if they are long, because 4 MB take some seconds; but not too few, because other columns may be long.
    share = min(limit, max(limit / 20, 2**22 * rows / max(size, 1.0))) / max(rows, 1.0)
    if share < 1.0:
        before = np.cumsum([0, *kept.units["rows"][kept.unit][:-1].tolist()]).tolist()
        takes = [
            (-1 - done, kept.takes[take][1] * share)
            for done, take in zip(before, kept.take, strict=True)
        ]
        kept = Pieces(kept.units, kept.unit, np.arange(len(kept), dtype=np.uint32), takes)
    drawn = np.zeros((len(plan.sources), 2))
    for piece in kept:
        unit = piece.unit
        planned = plan.files[piece.file]
        lines = plan.taken(planned, piece).sum()
        drawn[planned.source] += lines, lines * unit.size / unit.rows
    return dataclasses.replace(plan, pieces=kept, shards=(kept,)), drawn
