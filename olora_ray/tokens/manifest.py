"""Manifest of a token store, and the sidecars of its shards.

Both are JSON with a *seal*, the digest of their own content: a file that a crash or a disk has damaged is never
accepted, even if it still parses.
"""

import base64
import hashlib
import heapq
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
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from olora_ray.common import records, storage
from olora_ray.common.errors import UserError
from olora_ray.config.schema import AnyConfig
from olora_ray.data.columns import left_out, unresolved_error
from olora_ray.data.tokenize import form_line
from olora_ray.tokens.plan import NO_ROWS, Plan, RowDigests, Split, sources_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
# The note that counts the training rows that are left out as copies of held-out rows.
COPIES = "copies"


@dataclass(frozen=True)
class ShardInfo:
    """Facts about a shard that a reader needs: an entry of the manifest, and a part of the sidecar."""

    packs: Annotated[int, Field(ge=0)]
    tokens: int
    supervised: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, sidecar: dict[str, Any]) -> "ShardInfo":
        return cls(
            *(sidecar[name] for name in ("packs", "tokens", "supervised", "bytes", "sha256"))
        )


@dataclass(frozen=True)
class Outline:
    """Facts about a store that are known before any of it is built."""

    digest: str
    shards: int
    """Number of shards of the complete store."""
    max_length: int
    files: tuple[str, ...]
    """Files of the rows."""


@dataclass(frozen=True)
class Manifest:
    digest: str
    rows: int
    """Rows read, rejected ones included."""
    rejected: dict[str, int]
    """Rejected rows by reason."""
    rejected_sha256: str
    """Digest of rejected.jsonl."""
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
    """Counts of unusual rows."""

    def outline(self) -> Outline:
        return Outline(self.digest, len(self.shards), self.max_length, self.files)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


def sidecar_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def read_manifest(uri: str) -> Manifest | None:
    return records.read(storage.join(uri, MANIFEST), Manifest, sealed=True)


def read_sidecar(uri: str, number: int) -> dict[str, Any] | None:
    return records.read(storage.join(uri, sidecar_name(number)), dict[str, Any], sealed=True)


def file_size(uri: str, name: str) -> int | None:
    """Return the bytes of one file of a store; None if it is missing."""
    return storage.size(storage.join(uri, name))


# An origin is (file number << POSITION_BITS) + position in the file.
POSITION_BITS = 40


def origin_name(files: Sequence[str], origin: int) -> str:
    """Return an origin as file:line, counted from 1."""
    if not 0 <= origin >> POSITION_BITS < len(files):
        raise UserError(
            f"token store: an example names file {origin >> POSITION_BITS}, but {len(files)} are listed"
        )
    return f"{files[origin >> POSITION_BITS]}:{(origin & (2**POSITION_BITS - 1)) + 1}"


# Rejected rows of a store that is being built, in a temporary file: of a billion rows there may be millions.


class RejectedRows:
    """The lines of rejected.jsonl, added per shard in any order, and read in the order of the shards.

    A row that weights repeat is listed once, where it comes first.
    """

    def __init__(self, plan: Plan) -> None:
        self._repeats = any(turn > 0 for turn, _ in plan.pieces.takes)
        self._file = tempfile.SpooledTemporaryFile(4 * 2**20)  # noqa: SIM115 - closed when this object is gone
        weakref.finalize(self, self._file.close)
        self._end = 0
        # Start and end of each shard's lines in the file.
        self._places: dict[int, tuple[int, int]] = {}

    def put(self, number: int, entries: Sequence[dict[str, Any]]) -> None:
        # A shard that is put in again replaces its earlier rows.
        content = "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()
        self._file.seek(self._end)
        self._file.write(content)
        self._places[number] = (self._end, self._end + len(content))
        self._end += len(content)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for chunk in self.chunks():
            yield from map(json.loads, chunk.splitlines())

    def chunks(self) -> Iterator[bytes]:
        seen = set[bytes]()
        for number in sorted(self._places):
            start, end = self._places[number]
            self._file.seek(start)
            chunk = self._file.read(end - start)
            if self._repeats:  # otherwise the set would hold each row of a large corpus for nothing
                lines = [
                    line
                    for line in dict.fromkeys(chunk.splitlines(keepends=True))
                    if line not in seen
                ]
                seen.update(lines)
                chunk = b"".join(lines)
            yield chunk

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def write(self, path: str) -> None:
        storage.write_chunks(path, self.chunks)


# Remedies for rejected rows: the last part of the message that ends a run.


REMEDIES = {
    "too_long": "raise data.max_length{longest}",
    "pair_too_long": "raise data.max_length{longest}",
    "not_utf8": "save the file as UTF-8",
    "no_embedding": "put the model's own tokenizer into its folder, or add embeddings to the model for all its tokens",
    **dict.fromkeys(
        ("missing_field", "wrong_type", "not_an_object"),
        "name the columns in the fields of {where}, or set another format there",
    ),
}


def rejection_remedy(reasons: Mapping[str, int], rows: int, where: str, longest: str = "") -> str:
    """Return how to fix most of the rejected rows; if most of the `rows` can be used, also how to allow as many.

    `where` names the setting of their sources; `longest` ends the remedy for rows that are too long.
    """
    most = max(reasons, key=lambda reason: reasons[reason])
    first = REMEDIES.get(most, "fix or remove them").format(
        where=where.removeprefix("held out of "), longest=longest
    )
    share = sum(reasons.values()) / rows
    # Allowing most rows to be rejected would mean training on other data than intended.
    if share > 0.5:
        return first
    return f"{first}, or allow them with data.max_rejected={math.ceil(share * 1000) / 1000}"


# Totals over a store's shards: manifest, rejected rows, periodic progress.


SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Judged:
    """Rows that `data.max_rejected` applies to."""

    rows: int
    """Rejected ones included."""
    reasons: Mapping[str, int]
    """Rejected rows by reason."""
    listed: Callable[[], Iterable[dict[str, Any]]]
    """Returns the rejected rows."""

    def with_more(self, other: "Judged") -> "Judged":
        return Judged(
            self.rows + other.rows,
            Counter(self.reasons) + Counter(other.reasons),
            lambda: itertools.chain(self.listed(), other.listed()),
        )

    def check(self, limits: "Limits") -> None:
        limits.check(self.reasons, self.rows, self.listed)


NOT_JUDGED = Judged(0, {}, tuple)


@dataclass(frozen=True)
class Limits:
    setting: str
    """The sources of the rows, as messages name them."""
    share: float
    """`data.max_rejected`."""
    too_long: str = "reject"
    part: bool = False
    """True for rows of `data.eval_fraction`: they are judged together with the training rows of the same sources."""

    @classmethod
    def of(cls, config: AnyConfig, split: Split) -> "Limits":
        # Held-out rows of `data.eval_fraction` come from data.train, so messages call them held out of it.
        where, _ = sources_of(config, split)
        part = split == "eval" and config.data.eval_fraction is not None
        if part:
            where = f"held out of {where}"
        return cls(where, config.data.max_rejected, config.data.too_long, part)

    def allowed(self, rows: float) -> float:
        """Return how many of `rows` may be rejected: the share of them, and a single one of ten rows or more."""
        return max(
            self.share * rows, float(self.share > 0 and rows >= 10)
        )  # one bad row among few is tolerated

    def exceeded(self, reasons: Mapping[str, int], rows: float) -> bool:
        """True if more than the allowed number of `rows` was rejected; never for a part of the rows."""
        return not self.part and sum(counted(reasons).values()) > self.allowed(rows)

    def check(
        self, reasons: Mapping[str, int], rows: int, listed: Callable[[], Iterable[dict[str, Any]]]
    ) -> None:
        """Raise UserError, with counts, some of the rows `listed` and a remedy, if too many rows were rejected."""
        reasons = counted(reasons)
        bad = sum(reasons.values())
        if rows and bad == rows:
            problem = f"none of the {rows:,} rows can be used"
        elif self.exceeded(reasons, rows):
            problem = f"{bad:,} of {rows:,} rows cannot be used, more than data.max_rejected = {self.share:g} allows"
        else:
            return
        listed_rows = (each for each in listed() if each["reason"] in reasons)
        shown = heapq.nsmallest(3, listed_rows, key=lambda e: (e["source"], e["file"], e["line"]))
        first = "; ".join(f"{e['file']}:{e['line']}: {e['reason']}: {e['message']}" for e in shown)
        sources = {entry["source"] for entry in listed()}
        counts = (
            re.match(r"\d+(?= tokens)", e["message"])
            for e in listed()
            if e["reason"] in ("too_long", "pair_too_long")
        )
        longest = max((int(count[0]) for count in counts if count), default=0)
        where = self.setting
        if len(sources) == 1:
            where += f".{sources.pop()}"
        shorter = {
            "reject": " or set data.too_long to drop_turns or cut",
            "drop_turns": " or set data.too_long to cut",
        }
        most = ""
        if longest:
            most = f" (up to {longest:,}, as far as the model has positions)"
        if "pair_too_long" not in reasons:  # pairs are not cut
            most += shorter.get(self.too_long, "")
        remedy = rejection_remedy(reasons, rows, where, most)
        raise UserError(f"{where}: {problem} ({reason_counts(reasons)}); {first}; {remedy}")


NOTHING = {"empty_text", "no_messages"}
"""Reasons of rejected rows that hold nothing: they are counted, but do not count against `data.max_rejected`."""


def counted(reasons: Mapping[str, int]) -> dict[str, int]:
    """Return the reasons without those of rows that hold nothing."""
    return {reason: count for reason, count in reasons.items() if reason not in NOTHING}


def reason_counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))


@dataclass
class Totals:
    plan: Plan
    rejected: RejectedRows
    held_out: Judged = NOT_JUDGED
    """The rows that `data.eval_fraction` holds out of the same sources."""
    infos: list[ShardInfo] = field(default_factory=list)
    total: "Counter[str]" = field(default_factory=Counter)
    reasons: "Counter[str]" = field(default_factory=Counter)
    notes: "Counter[str]" = field(default_factory=Counter)
    fresh_rows: int = 0
    """Rows of the shards that this preparation has built."""
    started: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)

    @property
    def rows(self) -> int:
        return self.total["rows"]

    def add(self, sidecar: dict[str, Any], fresh: bool) -> None:
        """Count a shard; `fresh` if it was built now, so that its rejected rows are added as well."""
        if fresh:
            self.rejected.put(len(self.infos), sidecar["rejected"])
        self.infos.append(ShardInfo.of(sidecar))
        self.total.update(
            {name: sidecar[name] for name in ("rows", "examples", "packs", "tokens", "supervised")}
        )
        self.reasons.update(sidecar["reasons"])
        self.notes.update(sidecar["notes"])
        self.fresh_rows += sidecar["rows"] * fresh
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            speed = self.fresh_rows / max(now - self.started, 1e-3)
            left = max(self.plan.rows - self.rows, 0) / max(speed, 1e-3)
            logger.info(
                f"tokens: {self.rows:,} rows, {len(self.infos):,} of {len(self.plan.shards):,} shards,"
                f" fill {self._fill():.2f}, {speed:,.0f} rows/s, ETA {left:,.0f} s"
            )

    def check(self, limits: Limits) -> None:
        """Raise UserError if too many of all the rows were rejected, or none is left, or a column needs an answer."""
        self.judged().check(limits)
        if error := self._unanswered(limits):
            raise error
        if self._mostly_copies(self.rows):
            raise UserError(
                f"{limits.setting}: {self.notes[COPIES]:,} of {self.rows:,} training rows are copies of held-out rows;"
                " keep each row once and repeat them with the source's weight, or set data.eval to other rows"
            )
        if not self.total["packs"]:
            cause = ""
            if self.plan.eval_fraction:
                cause = f" (data.eval_fraction = {self.plan.eval_fraction:g})"
            raise UserError(f"{limits.setting}: no row is left for {self.plan.split}{cause}")

    def hopeless(self, limits: Limits) -> bool:
        """True if the rows so far suffice for `check` to refuse the data."""
        rows = max(int(self.plan.rows), self.rows)
        judged = self.judged()
        few = limits.exceeded(judged.reasons, rows + self.held_out.rows)
        few = few or self._mostly_copies(rows)
        return few or self._unanswered(limits) is not None

    def judged(self) -> Judged:
        """Return the rows so far, with those that are held out of the same sources."""
        own = Judged(self.rows, self.reasons, lambda: self.rejected)
        return own.with_more(self.held_out)

    def _unanswered(self, limits: Limits) -> UserError | None:
        return unresolved_error(
            self.notes,
            dict(enumerate(self.plan.sources)),
            limits.setting.removeprefix("held out of "),
        )

    def _mostly_copies(self, rows: int) -> bool:
        # Rows that are repeated many times are all held out once, and little else would be left to train on.
        return self.notes[COPIES] > rows / 2

    def manifest(self) -> Manifest:
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
            **{
                name: self.total[name]
                for name in ("rows", "examples", "packs", "tokens", "supervised")
            },
        )

    def _fill(self) -> float:
        return self.total["tokens"] / max(1, self.total["packs"] * self.plan.max_length)


def summary(manifest: Manifest) -> str:
    rows = f"{manifest.rows:,} rows"
    rejected = sum(manifest.rejected.values())
    if rejected:
        rows += f" ({rejected:,} rejected: {reason_counts(manifest.rejected)})"
    return (
        f"{rows}, {manifest.packs:,} sequences, {manifest.tokens:,} tokens, {manifest.supervised:,} supervised,"
        f" fill {manifest.fill:.2f}"
    )


# Notes about unusual rows of a split: counted per shard, and logged once.


def lines(notes: Mapping[str, int]) -> list[str]:
    texts = []
    if copies := notes.get(COPIES, 0):
        texts.append(f"copies of held-out rows, left out of the training: {copies:,}")
    if split := notes.get("split", 0):
        times = notes["split_tokens"] / notes["whole_tokens"]
        texts.append(
            f"{split:,} of {notes['chats']:,} chats were split by the chat template, one example per answer, into"
            f" {times:.1f} times the tokens; to train only the last answer of a chat, set data.last_turn_only: true"
        )
    if cut := notes.get("cut", 0):
        texts.append(
            f"rows cut at data.max_length (data.too_long: cut): {cut:,}; held-out rows with a cut last answer"
            " count in the loss, but the model does not answer them"
        )
    if dropped := notes.get("drop_turns", 0):
        texts.append(f"chats shortened to data.max_length (data.too_long: drop_turns): {dropped:,}")
    if marked := notes.get("marked", 0):
        texts.append(
            f"rows whose reasoning is trained as <think>...</think> before the answer: {marked:,} (the chat template"
            " has no place for it, so a server shows it as part of the answer)"
        )
    if single := notes.get("single", 0):
        texts.append(f"rows with a single supervised token: {single:,}")
    if unended := notes.get("unended", 0):
        texts.append(
            f"rows whose answer does not end with an end token: {unended:,} (the chat template writes none), so the"
            " model does not learn where to stop"
        )
    if unlike := notes.get("unlike", 0):
        texts.append(
            f"shards made again, because fastokens gave other tokens than the tokenizer: {unlike:,}; other shards may"
            " have such rows, too: uninstall fastokens, delete this folder and run the command again"
        )
    if left := left_out(notes):
        texts.append(f"left out of the rows, because nothing reads it: {left}")
    return texts


def form_lines(plan: Plan) -> list[str]:
    """Return a line per source whose form is a choice; only once if rows of the same sources are held out."""
    if plan.split == "eval" and plan.eval_fraction is not None:
        return []
    setting = f"data.{plan.split}"
    forms = (
        form_line(source, plan.spec, f"{setting}.{n}") for n, source in enumerate(plan.sources)
    )
    return [line for line in forms if line]


class HeldOut:
    """The rows of data.eval, and which of them are training rows too."""

    def __init__(self, rows: RowDigests) -> None:
        # Rows are compared by digests of their tokens.
        self._rows = rows
        self._met = np.zeros(len(rows), dtype=bool)

    def meet(self, rows: RowDigests) -> None:
        """Look for the held-out rows among these training rows; raise UserError as soon as too many match."""
        self._met |= np.isin(self._rows, rows)
        if self._met.sum() > max(
            0.01 * len(self._rows), float(len(self._rows) >= 10)
        ):  # one match may be a greeting
            more = "" if self._met.all() else " or more"
            raise UserError(self.line(more))

    def line(self, more: str = "") -> str:
        """Return the matches in a line, "" if there are none; `more` follows the number of the rows."""
        if not self._met.any():
            return ""
        return (
            f"data.eval: {self._met.sum():,}{more} of {len(self._rows):,} held-out rows are training rows too, so"
            " the held-out loss, the best step and the gate look better than they are; remove them from data.train,"
            " where a folder or a glob includes all its files"
        )


def row_digests(sidecar: Mapping[str, Any] | None) -> RowDigests:
    if sidecar is None:
        return NO_ROWS
    return np.frombuffer(base64.b64decode(sidecar["digests"]), dtype=np.uint64)
