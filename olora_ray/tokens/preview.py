"""Preview of a token store for --dry-run: what preparing it would give, without Ray and without writing a file.

Small data is read as a whole, and judged as the run judges it; of large data some rows of many places are read,
and what they say is scaled up. A file may be sorted by length: the places are spread evenly over its bytes, and at
each all rows count that begin in a window of the same size, however long they are.
"""

import itertools
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError, as_user_error
from olora_ray.config.schema import Config, Source
from olora_ray.data.reader import FileScan, Unit, Units
from olora_ray.data.scan import head, scan
from olora_ray.data.sources import File, asked, open_filesystem, total_bytes
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens import manifest
from olora_ray.tokens import shard as shards
from olora_ray.tokens.first_look import read_as
from olora_ray.tokens.manifest import Limits, RejectedRows, Totals
from olora_ray.tokens.plan import Floats, Pack, Plan, Split, looking, make_plan, sample

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

SCAN_ALL = 2 * 2**30
"""Bytes up to which all files are scanned, some seconds; of larger data some places are looked at."""
SLOW = {"csv": 16, "tsv": 16, "json": 16, "jsonl": 16, "parquet": 16}
"""As how many bytes one of these kinds counts: it takes longer, or places in the middle say as much. A compressed one
counts as 4."""
PLACES = 256
"""Places of all files of lines, when the data is larger."""
FILES_LOOKED_AT = 32
"""Other files of each source, and places of these."""
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
    note: str
    """What is not known since not all files were scanned."""
    lengths: tuple[int, ...]
    """Tokens of an example, at the QUANTILES of the examples."""
    longest: int
    """Tokens of the longest example that is no plain text, which is cut in pieces; 0 if there is none."""
    sources: tuple[SourceRows, ...]
    examples: tuple[Example, ...]
    """The first that is trained on, and the next from another source if there is one."""
    digests: NDArray[np.uint64]
    """Of the rows that were read."""
    some_packs: tuple[Pack, ...]
    """The first sequences."""


def describe(
    config: Config, spec: TokenizerSpec, split: Split = "train", limit: int = 2000, tell: bool = True
) -> Preview:
    """Preview a split, of large data from about `limit` rows, and `tell` in the log what is odd.

    Raises UserError as the preparation would.
    Of large data too many rejected rows are an error if they are too many of those that were read.
    """
    look = _Look(config.run.storage)
    plan = make_plan(config, spec, split, looking(config.run.storage, look, read_as))
    exact = look.complete and plan.shards.pieces.bytes <= READ_ALL
    part, drawn = (plan, look.sizes) if exact else sample(plan, limit)
    limits = Limits.of(config, split)
    if tell and (split == "train" or config.data.eval):
        for line in manifest.form_lines(plan):
            logger.info(line)
    note = "; ".join(sorted(look.notes))
    which = "; ".join(["of the rows that a dry run reads of so much data", *sorted(look.notes)])
    made, totals = _made(part, limits, "" if exact else f" ({which})")
    for line in manifest.lines(totals.notes) if tell else ():
        logger.info(f"of the rows that were read, {line}")
    weights = np.array([[1.0 if exact else source.weight * plan.kept_share] for source in plan.sources])
    found = _preview(part, limits, made, totals, look.sizes * weights / np.maximum(drawn, 1.0))
    return replace(found, exact=exact, note=note)


def _made(plan: Plan, limits: Limits, which: str) -> tuple[list[shards.Shard], Totals]:
    """The shards of the plan, in memory, judged as `prepare.make` judges them; `which` ends an error: of which rows."""
    totals, made = Totals(plan, RejectedRows(plan)), []
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


def _preview(plan: Plan, limits: Limits, made: Sequence[shards.Shard], totals: Totals, times: Floats) -> Preview:
    """The preview; `times`: (sources, 2) how many rows each of a source stands for, and how many bytes each of them."""
    total = totals.total
    examples = [example for shard in made for example in shard.examples]
    counts = np.array([(len(example.ids), np.count_nonzero(example.supervised)) for example in examples])
    source = [plan.files[origin >> manifest.PLACE_BITS].source for shard in made for origin in shard.origins]
    tokens, supervised = times[source, 1] @ counts
    first = next(shard for shard in made if shard.packs)  # the first of all may have no held-out row
    return Preview(
        limits=limits,
        rows=round(sum(count * times[number, 0] for shard in made for number, count in shard.rows_of.items())),
        packs=round(total["packs"] * tokens / total["tokens"]),
        tokens=round(tokens),
        supervised=round(supervised),
        fill=total["tokens"] / (total["packs"] * plan.max_length),
        read=total["rows"],
        rejected=dict(sorted(totals.reasons.items())),
        exact=True,
        note="",
        lengths=tuple(int(n) for n in np.quantile(counts[:, 0], QUANTILES, method="closest_observation")),
        longest=max(counts[[plan.sources[number].format != "text" for number in source], 0], default=0),
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
    """Scans small data as a whole, and looks at some places of large data."""

    def __init__(self, storage_root: str) -> None:
        self._storage = storage_root
        self.complete = True
        self.sizes: Floats = np.zeros((0, 2))
        """(sources, 2) rows and bytes of each."""
        self.notes: set[str] = set()
        """What is not known of large data."""

    def __call__(self, sources: Sequence[Sequence[File]]) -> list[list[FileScan]]:
        every = [file for files in sources for file in files]
        self.complete = sum(file.size * _cost(file) for file in every) <= SCAN_ALL
        scans = [self._source(files, PLACES / max(total_bytes(every), 1)) for files in sources]
        self.sizes = np.array([np.sum([_size(each) for each in found], axis=0) for found in scans])
        return scans

    def _source(self, files: Sequence[File], density: float) -> list[FileScan]:
        if self.complete:
            return [scan(file, self._storage, keep=False) for file in files]
        lines = [number for number, file in enumerate(files) if file.kind == "jsonl" and not file.compression]
        if lines and (written := head(files[lines[0]]).file) and (written.kind != "jsonl" or written.encoding):
            lines = []
        found = dict(_windows({number: files[number] for number in lines}, density))
        if found:
            self.notes.add("numbers of lines are estimates")
        others = sorted(set(range(len(files))) - set(lines))
        seen = _spread(others, FILES_LOOKED_AT)
        size = total_bytes([files[number] for number in seen])
        for number in seen:
            one = self._start(files[number], max(1, FILES_LOOKED_AT * files[number].size // max(size, 1)))
            times = total_bytes([files[number] for number in others]) / max(size, 1)
            found[number] = replace(one, rows=round(one.rows * times))
        return [found.get(number, FileScan("", 0, (), Units.of(()))) for number in range(len(files))]

    def _start(self, file: File, places: int) -> FileScan:
        """A cheap look at a file: at some units of its beginning, or at some places of all of parquet."""
        found = head(file)
        if file.kind != "parquet":
            self.notes.add(f"of {file.compression or file.kind} files the beginnings alone, so sorted ones mislead")
            return replace(found, units=Units.of(_spread(found.units, places)))
        units = []
        for first in _spread(range(found.rows), places):
            unit = found.units[int(np.searchsorted(found.units.table["first"], first, "right")) - 1]
            rows = min(256, unit.first + unit.rows - first)
            units.append(replace(unit, first=first, rows=rows, size=unit.size * rows // unit.rows))
        return replace(found, units=Units.of(units))


def _cost(file: File) -> int:
    return 4 if file.compression and file.kind == "jsonl" else SLOW.get(file.kind, 4 if file.compression else 1)


def _size(found: FileScan) -> tuple[float, float]:
    """Rows of a file, and their bytes, by those of its units."""
    return found.rows, found.rows * float(found.units.table["size"].sum()) / max(found.units.rows, 1)


def _windows(files: Mapping[int, File], density: float) -> Iterator[tuple[int, FileScan]]:
    """Looks at rows of files of lines: those that begin in windows of up to 64 KiB, `density` of them a byte."""
    ends = np.cumsum([0, *(file.size for file in files.values())])
    if not (total := int(ends[-1])):
        return
    count = max(8, round(total * density))
    half, numbers, parts = min(2**16, total / count) / 2, list(files), []
    for middle in (np.arange(count) + 0.5) * total / count:
        low, high = round(middle - half), round(middle + half)
        for place in range(int(np.searchsorted(ends, low, "right")), int(np.searchsorted(ends, high)) + 1):
            start, end = ends[place - 1 : place + 1].tolist()
            parts.append((numbers[place - 1], max(low - start, 0), min(high, end) - start))
    with ThreadPoolExecutor(16) as pool:  # in an object store each is a request
        contents = list(pool.map(lambda part: _begun(files[part[0]], *part[1:]), parts))
    times = total / count / (2 * half)
    for number, own in itertools.groupby(zip(parts, contents, strict=True), lambda each: each[0][0]):
        units, before = list[Unit](), 0
        for _, (rows, offset, content) in own:
            if rows:
                # The number of the line is a guess: nobody has counted those before it.
                units.append(Unit(round(before * times), rows, offset, len(content), 0, zlib.crc32(content)))
                before += rows
        yield number, FileScan("", round(before * times), (), Units.of(units))


def _begun(file: File, low: int, high: int) -> tuple[int, int, bytes]:
    """The lines that begin at bytes low..high-1 of a file: their number, where the first does, and their content."""

    def read() -> tuple[int, int, bytes]:
        system, path = open_filesystem(file.uri)
        with system.open_input_file(path) as stream:
            stream.seek(max(low - 1, 0))
            content = bytes(stream.read(high - max(low - 1, 0)))
            first = content.find(b"\n") + 1 if low else 0
            if first == len(content) or (low and not first):
                return 0, low, b""
            # The last line to its end, which no row of more than 128 MiB has.
            while not content.endswith(b"\n") and len(content) < 2**27:
                if not (more := bytes(stream.read(max(len(content), 2**16)))):
                    break
                content += more[: more.find(b"\n") + 1 or None]
        content = content[first:]
        return content.removesuffix(b"\n").count(b"\n") + 1, max(low - 1, 0) + first, content

    with as_user_error(file.uri, OSError):
        return asked(file.uri, read)


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    """Up to so many of the items, spread evenly over all."""
    count = min(most, len(items))
    return [items[int((number + 0.5) * len(items) / count)] for number in range(count)]
