"""Makes a token store: what is missing of it, spread over the cluster."""

import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from olora_ray import storage
from olora_ray.config import Config
from olora_ray.data import shards, stream
from olora_ray.data.plan import Plan, Split, make_plan, sources_of
from olora_ray.data.scan import FileScan, scan
from olora_ray.data.sources import File, total_bytes
from olora_ray.data.store import Manifest, ShardInfo, TokenStore, shard_name
from olora_ray.data.tokenize import TokenizerSpec
from olora_ray.errors import UserError

Say = Callable[[str], None]

SCAN_HERE = 64 * 2**20
"""Bytes up to which the driver scans by itself."""
MAKE_HERE = 4 * 2**20
"""Bytes up to which the driver tokenises by itself: starting Ray Data would take longer."""
SECONDS_BETWEEN_LINES = 10.0
EXAMPLES = 3
"""Rejected rows that an error message shows."""


@dataclass(frozen=True)
class _Job:
    """What tasks get."""

    plan: Plan
    uri: str


def prepare(config: Config, spec: TokenizerSpec, split: Split, say: Say) -> TokenStore:
    """See `store.prepare`."""
    plan = make_plan(config, spec, split, lambda found: _scan_all(found, config.run.storage, say))
    digest = plan.digest()
    uri = storage.join(config.run.storage, "tokens", digest)
    limits = _Limits(sources_of(config, split)[0], config.data.max_rejected)
    if storage.exists(storage.join(uri, "manifest.json")):
        store = TokenStore.open(uri)
        limits.check(store.manifest.rejected, store.manifest.rows, uri)
        say(f"tokens: {split}: {_summary(store.manifest)} (made before)")
        return store
    _make(_Job(plan, uri), limits, say)
    store = TokenStore.open(uri)
    say(f"tokens: {split}: {_summary(store.manifest)}")
    return store


def make_shard(job: _Job, number: int) -> dict[str, Any]:
    """Make one shard of a store and its sidecar, and return the sidecar; an error for the user is its "error"."""
    try:
        shard = shards.build(job.plan, number)
    except UserError as error:
        return {"error": str(error)}
    content = shards.file_bytes(shard.table())
    sidecar = shard.sidecar(content)
    storage.write_bytes(storage.join(job.uri, shard_name(number)), content)
    storage.write_text(storage.join(job.uri, _sidecar_name(number)), json.dumps(sidecar))
    return sidecar


def scan_file(job: tuple[Sequence[File], str], number: int) -> FileScan | str:
    """Scan one file; an error for the user is returned as text."""
    files, storage_root = job
    try:
        return scan(files[number], storage_root)
    except UserError as error:
        return str(error)


def _scan_all(sources: Sequence[Sequence[File]], storage_root: str, say: Say) -> list[list[FileScan]]:
    files = [file for source in sources for file in source]
    job = (files, storage_root)
    numbers = list(range(len(files)))
    size = total_bytes(files)
    if size <= SCAN_HERE:
        found: Generator[FileScan | str, None, None] = (scan_file(job, number) for number in numbers)
    else:
        say(f"tokens: scanning {len(files):,} files, {size / 1e9:,.1f} GB")
        found = stream.spread(scan_file, job, numbers)
    scans = []
    with contextlib.closing(found):
        for result in found:
            if isinstance(result, str):
                raise UserError(result)
            scans.append(result)
    rest = iter(scans)
    return [list(itertools.islice(rest, len(source))) for source in sources]


def _make(job: _Job, limits: "_Limits", say: Say) -> None:
    present = set(storage.names(job.uri))
    numbers = list(range(len(job.plan.shards)))
    done = {number for number in numbers if {_sidecar_name(number), shard_name(number)} <= present}
    missing = [number for number in numbers if number not in done]
    if done:
        say(f"tokens: {len(done):,} of {len(numbers):,} shards are there already")
    progress = _Progress(len(numbers), job.plan, say)
    with contextlib.closing(_made(job, missing)) as made:
        for number in numbers:
            if number in done:
                sidecar = json.loads(storage.read_text(storage.join(job.uri, _sidecar_name(number))))
            else:
                sidecar = next(made)
            if "error" in sidecar:
                raise UserError(sidecar["error"])
            progress.add(sidecar, number not in done)
            if limits.passed(progress.reasons, int(job.plan.rows)):
                _write_rejected(job, progress)
                limits.check(progress.reasons, progress.rows, job.uri, progress.rejected)
    _write_rejected(job, progress)
    limits.check(progress.reasons, progress.rows, job.uri, progress.rejected)
    if not progress.total["packs"]:
        cause = f" (data.eval_fraction = {job.plan.eval_fraction:g})" if job.plan.eval_fraction else ""
        raise UserError(f"{limits.setting}: no row is left for {job.plan.split}{cause}")
    storage.write_text(storage.join(job.uri, "manifest.json"), progress.manifest(job).to_json())


def _made(job: _Job, missing: list[int]) -> Generator[dict[str, Any], None, None]:
    size = sum(piece.unit.size for number in missing for piece in job.plan.shards[number])
    if len(missing) <= 1 or size <= MAKE_HERE:
        return (make_shard(job, number) for number in missing)
    return stream.spread(make_shard, job, missing)


def _write_rejected(job: _Job, progress: "_Progress") -> None:
    lines = dict.fromkeys(json.dumps(entry, ensure_ascii=True) for entry in progress.rejected)  # weights repeat rows
    storage.write_text(storage.join(job.uri, "rejected.jsonl"), "".join(f"{line}\n" for line in lines))


def _sidecar_name(number: int) -> str:
    return shard_name(number).replace(".arrow", ".json")


def _summary(manifest: Manifest) -> str:
    rejected = sum(manifest.rejected.values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejected.items())
    return (
        f"{manifest.rows:,} rows{f' ({rejected:,} rejected: {reasons})' if rejected else ''},"
        f" {manifest.packs:,} sequences, {manifest.tokens:,} tokens, {manifest.supervised:,} supervised,"
        f" fill {manifest.fill:.2f}"
    )


@dataclass(frozen=True)
class _Limits:
    """How many rows may be rejected."""

    setting: str
    share: float

    def passed(self, reasons: "Counter[str] | dict[str, int]", rows: int) -> bool:
        return sum(reasons.values()) > self.share * rows

    def check(
        self, reasons: "Counter[str] | dict[str, int]", rows: int, uri: str, rejected: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Raise UserError, with counts and examples, if more than the allowed share of the rows was rejected."""
        bad = sum(reasons.values())
        if rows and bad == rows:
            what = f"none of the {rows:,} rows can be used"
        elif self.passed(reasons, rows):
            what = f"{bad:,} of {rows:,} rows cannot be used, more than data.max_rejected = {self.share:g} allows"
        else:
            return
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
        shown = rejected or _kept(uri)
        first = "; ".join(f"{e['file']}:{e['line']}: {e['reason']}: {e['message']}" for e in shown[:EXAMPLES])
        raise UserError(f"{self.setting}: {what} ({counts}); {first}; all in {storage.join(uri, 'rejected.jsonl')}")


def _kept(uri: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_text(storage.join(uri, "rejected.jsonl")).splitlines()[:EXAMPLES]]


@dataclass
class _Progress:
    """Sums over the shards, and a line about them now and then."""

    count: int
    plan: Plan
    say: Say
    infos: list[ShardInfo] = field(default_factory=list)
    total: "Counter[str]" = field(default_factory=Counter)
    reasons: "Counter[str]" = field(default_factory=Counter)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    fresh_rows: int = 0
    started: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)

    @property
    def rows(self) -> int:
        return self.total["rows"]

    def add(self, sidecar: dict[str, Any], fresh: bool) -> None:
        self.infos.append(ShardInfo(*(sidecar[name] for name in ("packs", "tokens", "supervised", "bytes", "sha256"))))
        self.total.update({name: sidecar[name] for name in ("rows", "examples", "packs", "tokens", "supervised")})
        self.reasons.update(sidecar["reasons"])
        self.rejected.extend(sidecar["rejected"])
        self.fresh_rows += sidecar["rows"] * fresh
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            self.say(self._line(now))

    def fill(self) -> float:
        return self.total["tokens"] / max(1, self.total["packs"] * self.plan.max_length)

    def manifest(self, job: _Job) -> Manifest:
        return Manifest(
            digest=job.plan.digest(),
            rejected=dict(sorted(self.reasons.items())),
            fill=round(self.fill(), 4),
            max_length=job.plan.max_length,
            files=tuple(each.file.uri for each in job.plan.files),
            shards=tuple(self.infos),
            inputs=job.plan.inputs(),
            **{name: self.total[name] for name in ("rows", "examples", "packs", "tokens", "supervised")},
        )

    def _line(self, now: float) -> str:
        speed = self.fresh_rows / max(now - self.started, 1e-3)
        left = max(self.plan.rows - self.rows, 0) / max(speed, 1e-3)
        return (
            f"tokens: {self.rows:,} rows, {len(self.infos):,} of {self.count:,} shards, fill {self.fill():.2f},"
            f" {speed:,.0f} rows/s, ETA {left:,.0f} s"
        )
