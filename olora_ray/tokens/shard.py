"""One shard of a token store: its rows are tokenised, shuffled and packed, and written to its file."""

import base64
import gc
import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from pyarrow import ipc

from olora_ray.common.storage import digest_bytes
from olora_ray.data.encoder import Unlike
from olora_ray.data.formats import columns_of
from olora_ray.data.formats.format import Rejected
from olora_ray.data.reader import read_unit
from olora_ray.data.tokenize import Begun, ExampleTokenizer, Tokens
from olora_ray.tokens.manifest import COPIES, POSITION_BITS
from olora_ray.tokens.plan import Part, Piece, PlannedFile, RowDigests, Rules, key, permutation

# Packing of examples into fixed-length packs: first-fit decreasing in O(n log n).


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over packs of `capacity`, over as few as first-fit decreasing needs.

    Return the indices of the items in each pack, in the order in which they were added. Equal lengths keep their
    order, so the result depends only on `lengths`. At most 11/9 of the optimum + 1 packs. A length must lie in
    1..capacity.
    """
    leaves = 1 << max(0, (len(lengths) - 1).bit_length())
    # The free space of each pack, in a tree of maxima that finds the first fit in O(log n).
    free = [capacity] * (2 * leaves)
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        assert 1 <= lengths[index] <= capacity, (lengths[index], capacity)
        node = 1
        length = lengths[index]
        while node < leaves:
            node *= 2
            if free[node] < length:
                node += 1
        if node - leaves == len(packs):
            packs.append([])
        packs[node - leaves].append(index)
        free[node] -= length
        while node > 1:
            node //= 2
            most = free[2 * node]
            right = free[2 * node + 1]
            if right > most:
                most = right
            if free[node] == most:
                break
            free[node] = most
    return packs


SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
        ("segments", pa.list_(pa.int32())),
        ("origin", pa.list_(pa.int64())),
        ("supervised_count", pa.int32()),
    ]
)

# Characters that are tokenised together: their encodings are several dozen times as large.
TOGETHER = 2**17


@dataclass
class Shard:
    examples: list[Tokens] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    """One per example."""
    packs: list[list[int]] = field(default_factory=list)
    """Numbers of the examples in each sequence."""
    rows: int = 0
    """Rows read, rejected ones included."""
    rows_of: "Counter[int]" = field(default_factory=Counter)
    """Rows read, by the number of their source."""
    rejected: list[dict[str, Any]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """One per row with examples, of its tokens."""
    notes: "Counter[str]" = field(default_factory=Counter)
    """Counts of unusual rows."""

    def table(self) -> pa.Table:
        """Return the columns of the shard's file, one row per pack."""
        numbers = list(itertools.chain.from_iterable(self.packs))
        flat = [self.examples[number] for number in numbers]
        ids = np.concatenate([np.zeros(0, np.int32), *[example.ids for example in flat]])
        supervised = np.concatenate([np.zeros(0, bool), *[example.supervised for example in flat]])
        lengths = np.array([len(example.ids) for example in flat], dtype=np.int32)
        origins = np.array([self.origins[number] for number in numbers], dtype=np.int64)
        by_segment = _borders([len(members) for members in self.packs])
        by_token = _borders(lengths)[by_segment]
        counts = np.diff(_borders(supervised)[by_token])
        lists = (
            (by_token, ids),
            (by_token, supervised),
            (by_segment, lengths),
            (by_segment, origins),
        )
        columns = [
            pa.ListArray.from_arrays(_array(borders), _array(values)) for borders, values in lists
        ]
        return pa.Table.from_arrays([*columns, _array(counts)], schema=SCHEMA)

    def sidecar(self, content: bytes) -> dict[str, Any]:
        """Describe the shard for readers that do not open it; `content` is the content of the file."""
        chosen = [self.examples[number] for number in itertools.chain.from_iterable(self.packs)]
        supervised = np.concatenate(
            [np.zeros(0, bool), *[example.supervised for example in chosen]]
        )
        return {
            "rows": self.rows,
            "examples": len(chosen),
            "packs": len(self.packs),
            "tokens": len(supervised),
            "supervised": int(np.count_nonzero(supervised)),
            "bytes": len(content),
            "sha256": digest_bytes(content),
            "reasons": dict(
                sorted(Counter(str(entry["reason"]) for entry in self.rejected).items())
            ),
            "rejected": self.rejected,
            "digests": base64.b64encode(b"".join(self.digests)).decode(),
            "notes": dict(sorted(self.notes.items())),
        }


def build(rules: Rules, part: Part) -> Shard:
    """Build a shard in memory; raise UserError for a broken file, tokenizer or template."""
    collects = gc.isenabled()
    gc.disable()  # the collector would take a seventh of the time, and rows leave hardly a cycle behind
    try:
        return _built(rules, part)
    except Unlike:
        shard = _built(rules, part)
        shard.notes["unlike"] += 1
        return shard
    finally:
        if collects:
            gc.enable()


def _built(rules: Rules, part: Part) -> Shard:
    shard = Shard()
    tokenize = ExampleTokenizer(rules.spec, rules.max_length, rules.last_turn_only, rules.too_long)
    for piece in part.pieces:
        _add(shard, rules, part.files[piece.file], piece, tokenize)
    _arrange(shard, rules, part.number)
    return shard


def file_bytes(table: pa.Table) -> bytes:
    """Return the table as an Arrow file, uncompressed so that it can be memory-mapped."""
    sink = io.BytesIO()
    with ipc.new_file(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return sink.getvalue()


def _add(
    shard: Shard, rules: Rules, planned: PlannedFile, piece: Piece, tokenize: ExampleTokenizer
) -> None:
    for group in _begun(shard, rules, planned, piece, tokenize):
        tokenize.ahead([begun for _, begun in group if isinstance(begun, Begun)])
        shard.rows += len(group)
        shard.rows_of[planned.source] += len(group)
        for position, begun in group:
            try:
                if isinstance(begun, Rejected):
                    raise begun
                tokens = begun.finish()
            except Rejected as why:
                shard.rejected.append(
                    {
                        "source": planned.source,
                        "file": planned.file.uri,
                        "line": position + 1,
                        "reason": why.reason,
                        "message": why.message,
                    }
                )
                continue
            digest = hashlib.blake2b(
                b"".join([each.ids.tobytes() for each in tokens]), digest_size=8
            ).digest()
            if len(rules.held_out) and _among(rules.held_out, digest):
                shard.notes[COPIES] += 1
                continue
            tokenize.note(begun, tokens, shard.notes)
            shard.digests.append(digest)
            shard.examples.extend(tokens)
            shard.origins.extend([(piece.file << POSITION_BITS) + position] * len(tokens))


def _among(rows: RowDigests, digest: bytes) -> bool:
    (wanted,) = np.frombuffer(digest, dtype=np.uint64)
    place = int(np.searchsorted(rows, wanted))
    return place < len(rows) and bool(rows[place] == wanted)


def _begun(
    shard: Shard, rules: Rules, planned: PlannedFile, piece: Piece, tokenize: ExampleTokenizer
) -> Iterator[list[tuple[int, Begun | Rejected]]]:
    source = rules.sources[planned.source]
    wanted = columns_of(source.format, source.fields)
    columns = dict.fromkeys(planned.columns)
    first = piece.unit.first
    keep = rules.taken(planned, piece).tolist()
    group: list[tuple[int, Begun | Rejected]] = []
    size = 0
    for position, row in read_unit(planned.file, piece.unit, planned.columns, wanted):
        if not keep[position - first]:
            continue
        # Columns that were not read count as existing, so that a message can name them.
        if columns and isinstance(row, Mapping) and len(row) != len(columns):
            row = {**columns, **row}
        try:
            begun = tokenize.begin_row(row, source, planned.source, shard.notes)
            size += begun.size
            group.append((position, begun))
        except Rejected as why:
            group.append((position, why))
        if size >= TOGETHER:
            yield group
            group = []
            size = 0
    yield group


def _arrange(shard: Shard, rules: Rules, number: int) -> None:
    """Shuffle (training only) and pack the examples; evaluation keeps the order of rows as far as packing allows."""
    count = len(shard.examples)
    order = np.arange(count, dtype=np.int64)
    if rules.split == "train":
        order = permutation(count, key("rows", rules.seed, number))
    if rules.packing:
        lengths = [len(shard.examples[index].ids) for index in order]
        chosen = [sorted(members) for members in pack(lengths, rules.max_length)]
    else:
        chosen = [[index] for index in range(count)]
    chosen.sort()
    packs = [order[members].tolist() for members in chosen]
    if rules.split == "train":
        # Packing filled the packs from the longest example down, so their order still follows the lengths: shuffle.
        packs = [
            packs[index] for index in permutation(len(packs), key("packs", rules.seed, number))
        ]
    shard.packs = packs


def _borders(lengths: ArrayLike) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


def _array(values: NDArray[Any]) -> pa.Array:
    # `pa.array` imports pandas, which takes longer than to write a shard.
    bits = values
    if values.dtype == bool:
        bits = np.packbits(values, bitorder="little")
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(bits)]
    )
