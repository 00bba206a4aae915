"""Manifest of a token store, and the sidecars of its shards.

Both are JSON with a *seal*, the digest of their own content: what a crash or a disk has damaged is
never taken for good, whatever still parses.
"""

import base64
import hashlib
import itertools
import json
import logging
import math
import re
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import seal, unseal
from olora_ray.config.schema import AnyConfig
from olora_ray.data.formats import REASONING, Chat, Example, Text, one_line
from olora_ray.data.tokenize import ExampleTokenizer, Tokens, form_line
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.plan import Plan, Split, sources_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class ShardInfo:
    """Facts that a reader needs of a shard: a line of the manifest, and a part of the sidecar."""

    packs: int
    tokens: int
    supervised: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, sidecar: dict[str, Any]) -> "ShardInfo":
        """The part of a sidecar."""
        return cls(*(sidecar[name] for name in ("packs", "tokens", "supervised", "bytes", "sha256")))


@dataclass(frozen=True)
class Outline:
    """The facts of a store that are known before any of it is made."""

    digest: str
    shards: int
    """Number of shards of the complete store."""
    max_length: int
    files: tuple[str, ...]
    """Files of the rows."""


@dataclass(frozen=True)
class Manifest:
    """Contents of a complete store."""

    digest: str
    rows: int
    """Rows read, rejected ones included."""
    rejected: dict[str, int]
    """Rows by the reason why they cannot be used."""
    rejected_sha256: str
    """Of rejected.jsonl."""
    examples: int
    packs: int
    tokens: int
    supervised: int
    fill: float
    """Tokens / (packs * max_length)."""
    max_length: int
    files: tuple[str, ...]
    """Files of the rows; other files with the same content share the store."""
    shards: tuple[ShardInfo, ...] = field(repr=False)
    inputs: dict[str, Any] = field(repr=False)
    """The inputs of the digest."""
    notes: dict[str, int] = field(default_factory=dict, repr=False)
    """Counts of what is odd about the rows."""

    def to_json(self) -> str:
        """The text of manifest.json."""
        return seal(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read `to_json` back; raises ValueError of one line for anything else."""
        try:
            found = _MANIFEST.validate_python(unseal(text))
        except ValidationError as error:
            wrong = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
        if min((0, *(shard.packs for shard in found.shards))) < 0:
            raise ValueError("a shard has less than no sequence")
        return found

    def outline(self) -> Outline:
        """The part that was known before."""
        return Outline(self.digest, len(self.shards), self.max_length, self.files)


_MANIFEST = TypeAdapter(Manifest)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.arrow"


def sidecar_name(number: int) -> str:
    """File name of a shard's sidecar."""
    return f"shard-{number:05d}.json"


def read_manifest(uri: str) -> Manifest:
    """The manifest of a store; raises FileNotFoundError, or ValueError if it is damaged."""
    return Manifest.from_json(storage.read_bytes(storage.join(uri, MANIFEST)).decode())


def file_size(uri: str, name: str) -> int | None:
    """Bytes of one file of a store; None if it is not there."""
    return storage.size(storage.join(uri, name))


PLACE_BITS = 40
"""An origin is (file number << PLACE_BITS) + place in the file."""


def place_name(files: Sequence[str], origin: int) -> str:
    """An origin as file:line, counted from 1."""
    if not 0 <= origin >> PLACE_BITS < len(files):
        raise UserError(f"token store: an example comes from file {origin >> PLACE_BITS}, but {len(files)} are listed")
    return f"{files[origin >> PLACE_BITS]}:{(origin & (2**PLACE_BITS - 1)) + 1}"


# Rejected rows of a store that is being made, in a temporary file: of a billion rows there may be millions.


class RejectedRows:
    """The lines of rejected.jsonl, put in shard by shard in any order, and read in the order of the shards.

    A row that weights repeat is listed once, where it comes first.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._repeats = any(turn > 0 for turn, _ in plan.shards.pieces.takes)
        self._file = tempfile.SpooledTemporaryFile(4 * 2**20)  # noqa: SIM115 - closed when this object is gone
        weakref.finalize(self, self._file.close)
        self._end = 0
        self._places: dict[int, tuple[int, int]] = {}
        """Start and end of each shard's lines in the file."""

    def put(self, number: int, entries: Sequence[dict[str, Any]]) -> None:
        """Take the rejected rows of a shard, as its sidecar has them, in place of those that it had."""
        lines = dict.fromkeys(json.dumps(entry, ensure_ascii=True) for entry in self._first(number, entries))
        content = "".join(f"{line}\n" for line in lines).encode()
        self._file.seek(self._end)
        self._file.write(content)
        self._places[number] = (self._end, self._end + len(content))
        self._end += len(content)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The entries."""
        for chunk in self.chunks():
            yield from map(json.loads, chunk.splitlines())

    def chunks(self) -> Iterator[bytes]:
        """The content of rejected.jsonl, shard by shard."""
        for number in sorted(self._places):
            start, end = self._places[number]
            self._file.seek(start)
            yield self._file.read(end - start)

    def sha256(self) -> str:
        """The digest of that content."""
        found = hashlib.sha256()
        for chunk in self.chunks():
            found.update(chunk)
        return found.hexdigest()

    def write(self, place: str) -> None:
        """Write rejected.jsonl."""
        storage.write_chunks(place, self.chunks)

    def _first(self, number: int, entries: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Those of the first turn over their source: it has every row that a later turn repeats, and comes before."""
        if not (self._repeats and entries):
            return entries
        pieces = self._plan.shards[number]
        first = np.array([turn == 0 for turn, _ in pieces.takes])[pieces.take]
        spans: dict[tuple[int, str], list[tuple[int, int]]] = {}
        for piece in pieces[np.flatnonzero(first)]:
            planned, unit = self._plan.files[piece.file], piece.unit
            spans.setdefault((planned.source, planned.file.uri), []).append((unit.first, unit.first + unit.rows))
        return [
            entry for entry in entries if _inside(entry["line"] - 1, spans.get((entry["source"], entry["file"]), ()))
        ]


def _inside(place: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(low <= place < high for low, high in spans)


# What to do about rows that were rejected: the last part of the message that ends a run.


REMEDIES = {
    "too_long": "raise data.max_length{longest}",
    "not_utf8": "save the file as UTF-8",
    "no_embedding": "put the model's own tokenizer into its folder, or give it embeddings for all tokens of this one",
    **dict.fromkeys(
        ("missing_field", "wrong_type", "not_an_object"),
        "name the columns in the fields of {where}, or set another format there",
    ),
}


def rejection_remedy(reasons: Mapping[str, int], rows: int, where: str, longest: str = "") -> str:
    """What mends most of the rejected rows; where most of the `rows` can be used, also how to allow as many.

    `where` names the setting of their sources; `longest` is the end of what to do about rows that are too long.
    """
    most = max(reasons, key=lambda reason: reasons[reason])
    first = REMEDIES.get(most, "mend or remove them").format(where=where.removeprefix("held out of "), longest=longest)
    share = sum(reasons.values()) / rows
    # To allow most rows to be rejected would train on other data than was meant.
    return (
        first if share > 0.5 else f"{first}, or allow as many with data.max_rejected={math.ceil(share * 1000) / 1000}"
    )


# Totals over a store's shards: manifest, rejected rows, periodic progress.


SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Limits:
    """Limits of the rejected rows of a split."""

    setting: str
    """The sources of the rows, as messages name them."""
    share: float
    """`data.max_rejected`."""
    too_long: str = "reject"

    @classmethod
    def of(cls, config: AnyConfig, split: Split) -> "Limits":
        """The limits of a split; held-out rows of `data.eval_fraction` are named as such."""
        setting, _ = sources_of(config, split)
        drawn = split == "eval" and config.data.eval_fraction is not None
        where = f"held out of {setting}" if drawn else setting
        return cls(where, config.data.max_rejected, config.data.too_long)

    def allowed(self, rows: float) -> float:
        """Rows of `rows` that may be rejected: the share of them, and of ten rows or more a single one."""
        return max(self.share * rows, float(self.share > 0 and rows >= 10))  # a few held-out rows may have an odd one

    def passed(self, reasons: Mapping[str, int], rows: float) -> bool:
        """Whether more than the allowed number of `rows` was rejected."""
        return sum(reasons.values()) > self.allowed(rows)

    def check(self, reasons: Mapping[str, int], rows: int, listed: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Raise UserError, with counts, examples of those `listed` and a remedy, if too many rows were rejected."""
        bad = sum(reasons.values())
        if rows and bad == rows:
            what = f"none of the {rows:,} rows can be used"
        elif self.passed(reasons, rows):
            what = f"{bad:,} of {rows:,} rows cannot be used, more than data.max_rejected = {self.share:g} allows"
        else:
            return
        shown = itertools.islice(listed(), 3)
        first = "; ".join(f"{e['file']}:{e['line']}: {e['reason']}: {e['message']}" for e in shown)
        sources = {entry["source"] for entry in listed()}
        told = (re.match(r"\d+(?= tokens)", e["message"]) for e in listed() if e["reason"] == "too_long")
        longest = max((int(found[0]) for found in told if found), default=0)
        where = f"{self.setting}.{sources.pop()}" if len(sources) == 1 else self.setting
        shorten = " or set data.too_long to drop_turns or cut" if self.too_long == "reject" else ""
        remedy = rejection_remedy(reasons, rows, where, f"{f' (up to {longest:,})' if longest else ''}{shorten}")
        raise UserError(f"{where}: {what} ({reason_counts(reasons)}); {first}; {remedy}")


def reason_counts(reasons: Mapping[str, int]) -> str:
    """`no_answer 1, too_long 22`."""
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))


@dataclass
class Totals:
    """Sums over the shards, added in their order."""

    plan: Plan
    rejected: RejectedRows
    infos: list[ShardInfo] = field(default_factory=list)
    total: "Counter[str]" = field(default_factory=Counter)
    reasons: "Counter[str]" = field(default_factory=Counter)
    notes: "Counter[str]" = field(default_factory=Counter)
    fresh_rows: int = 0
    """Rows of the shards that were made now."""
    started: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)

    @property
    def rows(self) -> int:
        """Rows read so far."""
        return self.total["rows"]

    def add(self, sidecar: dict[str, Any], fresh: bool) -> None:
        """Count a shard; `fresh` if it was made now, so that its rejected rows are taken as well."""
        if fresh:
            self.rejected.put(len(self.infos), sidecar["rejected"])
        self.infos.append(ShardInfo.of(sidecar))
        self.total.update({name: sidecar[name] for name in ("rows", "examples", "packs", "tokens", "supervised")})
        self.reasons.update(sidecar["reasons"])
        self.notes.update(sidecar["notes"])
        self.fresh_rows += sidecar["rows"] * fresh
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            logger.info(self._line(now))

    def check(self, limits: Limits) -> None:
        """Raise UserError if, of all the rows, too many were rejected or none is left."""
        limits.check(self.reasons, self.rows, lambda: self.rejected)
        if not self.total["packs"]:
            cause = f" (data.eval_fraction = {self.plan.eval_fraction:g})" if self.plan.eval_fraction else ""
            raise UserError(f"{limits.setting}: no row is left for {self.plan.split}{cause}")

    def hopeless(self, limits: Limits) -> bool:
        """Whether more rows were rejected already than all the rows of the plan allow."""
        return limits.passed(self.reasons, max(int(self.plan.rows), self.rows))

    def manifest(self) -> Manifest:
        """The manifest of the store, once all shards are added."""
        assert len(self.infos) == len(self.plan.shards)
        return Manifest(
            digest=self.plan.digest(),
            rejected=dict(sorted(self.reasons.items())),
            rejected_sha256=self.rejected.sha256(),
            fill=round(self._fill(), 4),
            max_length=self.plan.max_length,
            files=tuple(each.file.uri for each in self.plan.files),
            shards=tuple(self.infos),
            inputs=self.plan.inputs(),
            notes=dict(sorted(self.notes.items())),
            **{name: self.total[name] for name in ("rows", "examples", "packs", "tokens", "supervised")},
        )

    def _fill(self) -> float:
        return self.total["tokens"] / max(1, self.total["packs"] * self.plan.max_length)

    def _line(self, now: float) -> str:
        speed = self.fresh_rows / max(now - self.started, 1e-3)
        left = max(self.plan.rows - self.rows, 0) / max(speed, 1e-3)
        return (
            f"tokens: {self.rows:,} rows, {len(self.infos):,} of {len(self.plan.shards):,} shards,"
            f" fill {self._fill():.2f}, {speed:,.0f} rows/s, ETA {left:,.0f} s"
        )


def summary(manifest: Manifest) -> str:
    """A complete store in one line."""
    rejected = sum(manifest.rejected.values())
    return (
        f"{manifest.rows:,} rows{f' ({rejected:,} rejected: {reason_counts(manifest.rejected)})' if rejected else ''},"
        f" {manifest.packs:,} sequences, {manifest.tokens:,} tokens, {manifest.supervised:,} supervised,"
        f" fill {manifest.fill:.2f}"
    )


# What is odd about the rows of a split: counted shard by shard, and said once.


UNREAD = {
    "column": "columns that the format does not read",
    "key": "keys of messages that neither the format nor the chat template reads",
}


@lru_cache(maxsize=8)
def _read_keys(template: str) -> frozenset[str]:
    """The keys of messages that are read: by the formats, and all that a template names."""
    named = {"role", "content", "tool_calls", "weight", *re.findall(r"\w+", template)}
    return frozenset(named.union(REASONING) if named.intersection(REASONING) else named)


def count_unread(notes: "Counter[str]", kind: str, names: Iterable[object]) -> None:
    """Add one to each of the names that nothing reads, of a bounded number of them."""
    for name in names:
        note = f"{kind} {one_line(str(name), 60)}"
        if note in notes or len(notes) < 100:
            notes[note] += 1


def count(
    notes: "Counter[str]", example: Example, found: Sequence[Tokens], tokenize: ExampleTokenizer, spec: TokenizerSpec
) -> None:
    """Add an example and its tokens to the notes of its shard."""
    if isinstance(example, Text):
        return
    if isinstance(example, Chat):
        notes["chats"] += 1
        read = _read_keys(spec.template(example.tools is not None))
        for message in example.messages:
            count_unread(notes, "key", message.keys() - read)
        if len(found) > 1:
            notes["split"] += 1
            notes["split_tokens"] += sum(len(each.ids) for each in found)
            notes["whole_tokens"] += max(len(each.ids) for each in found)
    if min(int(np.count_nonzero(each.supervised)) for each in found) == 1:
        notes["single"] += 1
    if not all(each.shortened or tokenize.ends(each) for each in found):
        notes["unended"] += 1
    if any(each.shortened for each in found):
        notes[tokenize.too_long] += 1


def lines(notes: Mapping[str, int]) -> list[str]:
    """The notes of a split, a line each."""
    found = []
    if split := notes.get("split", 0):
        times = notes["split_tokens"] / notes["whole_tokens"]
        found.append(
            f"{split:,} of {notes['chats']:,} chats were split by the chat template, one example an answer, into"
            f" {times:.1f} times the tokens; with data.last_turn_only: true only the last answer of a chat is trained"
        )
    if cut := notes.get("cut", 0):
        found.append(
            f"rows cut at data.max_length (data.too_long: cut): {cut:,}; held-out rows whose last answer is cut"
            " count in the loss, and are not answered"
        )
    if dropped := notes.get("drop_turns", 0):
        found.append(f"chats without their last turns, for data.max_length (data.too_long: drop_turns): {dropped:,}")
    if single := notes.get("single", 0):
        found.append(f"rows with a single supervised token: {single:,}")
    if unended := notes.get("unended", 0):
        found.append(
            f"rows whose answer does not end with an end token: {unended:,} (the chat template writes none), so the"
            " model does not learn where to stop"
        )
    for kind, what in UNREAD.items():
        unread = {note.partition(" ")[2]: rows for note, rows in notes.items() if note.startswith(f"{kind} ")}
        if names := sorted(unread, key=lambda name: -unread[name]):
            shown = ", ".join(f"{name} ({unread[name]:,})" for name in names[:12]) + ", ..." * (len(names) > 12)
            found.append(f"{what}: {shown}")
    return found


def form_lines(plan: Plan) -> list[str]:
    """The form of each source that has a choice, a line each; once for rows of which some are held out."""
    if plan.split == "eval" and plan.eval_fraction is not None:
        return []
    setting = f"data.{plan.split}"
    found = (form_line(source, plan.spec, f"{setting}.{n}") for n, source in enumerate(plan.sources))
    return [line for line in found if line]


class HeldOut:
    """The rows of a split that is held out, and which of them were met among the training rows."""

    def __init__(self, rows: NDArray[np.uint64], setting: str) -> None:
        """`rows` are digests of their tokens; `setting` is that of their sources, as in `Limits`."""
        self._rows, self._setting = rows, setting
        self._met = np.zeros(len(rows), dtype=bool)

    def meet(self, rows: NDArray[np.uint64]) -> None:
        """Look for the rows among these of the training data; raises UserError as soon as too many are found."""
        self._met |= np.isin(self._rows, rows)
        if self._met.sum() > max(0.01 * len(self._rows), float(len(self._rows) >= 10)):  # one may be a greeting
            raise UserError(self.line(" or more" * (not self._met.all())))

    def line(self, more: str = "") -> str:
        """What was found; empty if nothing was. `more` stands behind the number of the rows."""
        remedy = "take them out of data.train, where a folder and a glob take all that is there"
        if self._setting != "data.eval":
            remedy = "remove what is repeated from data.train, or hold out other rows with data.eval"
        return bool(self._met.any()) * (
            f"{self._setting}: {self._met.sum():,}{more} of {len(self._rows):,} held-out rows are training rows too, so"
            f" the held-out loss, the best step and the gate look better than they are; {remedy}"
        )


def row_digests(sidecar: Mapping[str, Any] | None) -> NDArray[np.uint64]:
    """The digests of the rows of a shard, from its sidecar."""
    return np.frombuffer(base64.b64decode(sidecar["digests"] if sidecar else ""), dtype=np.uint64)
