"""Preparation of a token store, at once or beside a training that reads it already."""

import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from olora_ray.common import node_cache, records, storage
from olora_ray.common.errors import UserError
from olora_ray.common.fault_points import reached
from olora_ray.common.node_cache import fetched
from olora_ray.config.decided import AnyData
from olora_ray.config.schema import AnyConfig
from olora_ray.data.detect import read_as
from olora_ray.data.reader import FileScan
from olora_ray.data.scan import forget_changed, kept_scans, scan
from olora_ray.data.sources import File
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens import manifest as notes
from olora_ray.tokens import shard as shards
from olora_ray.tokens.arrival import Arrival
from olora_ray.tokens.manifest import (
    MANIFEST,
    NOT_JUDGED,
    REJECTED,
    HeldOut,
    Judged,
    Limits,
    Manifest,
    Outline,
    RejectedRows,
    ShardInfo,
    Totals,
    file_size,
    read_manifest,
    read_sidecar,
    row_digests,
    shard_name,
    sidecar_name,
    summary,
)
from olora_ray.tokens.plan import (
    Look,
    Part,
    Plan,
    RowDigests,
    Rules,
    Split,
    looking,
    make_plan,
    once,
)
from olora_ray.tokens.spread import Lazy, cores, map_ordered, parallel_map
from olora_ray.tokens.store import TokenStore

logger = logging.getLogger(__name__)

# Writer of token stores: it builds the shards that are missing or damaged, spread over the cluster.


# Input bytes up to which the driver tokenises by itself, in about a second. Up to eight times as many per core of this
# machine are tokenised by processes of the driver, in ten seconds: Ray Data takes six until its first shard.
MAKE_HERE = 4 * 2**20


@dataclass(frozen=True)
class StoreSpec:
    plan: Plan
    uri: str
    storage_root: str
    """`run.storage`, where scans of files are kept."""

    def for_tasks(self) -> tuple[Rules, str, str]:
        """Return what all tasks that build shards share; each also gets its own `Part` of the plan, which is large."""
        return self.plan.rules(), self.uri, self.storage_root

    def outline(self) -> Outline:
        files = tuple(each.file.uri for each in self.plan.files)
        return Outline(self.plan.digest(), len(self.plan.shards), self.plan.max_length, files)


@dataclass
class StoreStatus:
    """The intact parts of a store, judged by sizes and seals; readers check the digests of shards."""

    rejected: RejectedRows
    """Rejected rows of the shards that are done."""
    manifest: Manifest | None = None
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Sidecars of the intact shards without their rejected rows; none if the store is complete."""
    missing: list[int] = field(default_factory=list)
    """Numbers of the shards to build."""
    complete: bool = False
    """True if nothing is left to do."""

    def size(self, plan: Plan) -> int:
        return sum(plan.shards[number].bytes for number in self.missing)


def store_status(job: StoreSpec) -> StoreStatus:
    status = StoreStatus(RejectedRows(job.plan))
    sizes = storage.files_below(job.uri)
    if MANIFEST in sizes:
        manifest = read_manifest(job.uri)
        if manifest and (manifest.digest, len(manifest.shards)) == (
            job.plan.digest(),
            len(job.plan.shards),
        ):
            status.manifest = manifest
            shards = enumerate(manifest.shards)
            listed = REJECTED in sizes and storage.digest_of(storage.join(job.uri, REJECTED))
            status.complete = listed == manifest.rejected_sha256 and all(
                sizes.get(shard_name(number)) == shard.bytes for number, shard in shards
            )
    if status.complete:
        return status

    def sidecar_of(number: int) -> dict[str, Any] | None:
        if sidecar_name(number) not in sizes:
            return None
        return read_sidecar(job.uri, number)

    # 32 sidecars are read and held at a time, not all of them, because each may list many rejected rows.
    with ThreadPoolExecutor(32) as pool:
        numbers = range(len(job.plan.shards))
        for start in numbers[::32]:
            batch = numbers[start : start + 32]
            for number, sidecar in zip(batch, pool.map(sidecar_of, batch), strict=True):
                if sidecar is None:
                    status.missing.append(number)
                    status.rejected.put(number, ())
                    continue
                del sidecar["digests"]  # there may be a billion, too many to hold
                status.rejected.put(number, sidecar.pop("rejected"))
                if sizes.get(shard_name(number)) == sidecar["bytes"]:
                    status.done[number] = sidecar
                else:
                    status.missing.append(number)
    return status


def make(
    job: StoreSpec,
    status: StoreStatus,
    limits: Limits,
    stopped: Callable[[], bool],
    cpus_held: float = 0.0,
    apart: HeldOut | None = None,
    held_out: Judged = NOT_JUDGED,
) -> bool:
    """Build what `status` lacks, in the order of the shards; return False if `stopped` ended it between two.

    `cpus_held` are CPUs that this run will take meanwhile. The limits apply to the rows of this plan and those
    `held_out` of the same sources together. Raise UserError for data that cannot be used, for rows that must be
    `apart`, and for a shard that cannot be rebuilt as it was.
    """
    totals = Totals(job.plan, status.rejected, held_out)
    with contextlib.closing(_made(job, status, cpus_held)) as made:
        for number in range(len(job.plan.shards)):
            if stopped():
                return False
            sidecar = status.done.get(number)
            fresh = sidecar is None
            if sidecar is None:
                sidecar = next(made)
            if "error" in sidecar:
                raise UserError(sidecar["error"])
            before = status.manifest
            if before and before.shards[number] != ShardInfo.of(sidecar):
                raise UserError(
                    f"token store {job.uri}: the rebuilt {shard_name(number)} differs from the original (were"
                    " libraries updated?); delete the folder to rebuild all shards"
                )
            totals.add(sidecar, fresh)
            if apart:
                apart.meet(row_digests(sidecar if fresh else read_sidecar(job.uri, number)))
            # Bad data ends the preparation here, not after hours of tokenising; the manifest comes last.
            if totals.hopeless(limits):
                break
    totals.rejected.write(storage.join(job.uri, REJECTED))
    if totals.reasons:
        logger.info(
            f"tokens: {job.plan.split}: rejected rows are listed in {storage.join(job.uri, REJECTED)}"
        )
    totals.check(limits)
    records.write(storage.join(job.uri, MANIFEST), totals.manifest(), indent=1, sealed=True)
    return True


def make_shard(job: tuple[Rules, str, str], part: Part) -> dict[str, Any]:
    """Build one shard of a store and its sidecar, and return the sidecar; an error for the user is its "error".

    A shard that another preparation has finished meanwhile is used as it is.
    """
    rules, uri, storage_root = job
    number = part.number
    reached("shard", number)
    sidecar = read_sidecar(uri, number)
    if sidecar is not None and file_size(uri, shard_name(number)) == sidecar["bytes"]:
        return sidecar
    try:
        shard = shards.build(rules, part)
    except UserError as error:
        forget_changed(error, storage_root)
        return {"error": str(error)}
    # The sidecar is written after the shard: for readers a shard with a sidecar is complete.
    content = shards.file_bytes(shard.table())
    sidecar = shard.sidecar(content)
    storage.write_bytes(storage.join(uri, shard_name(number)), content)
    records.write(storage.join(uri, sidecar_name(number)), sidecar, sealed=True)
    return sidecar


def _made(
    job: StoreSpec, status: StoreStatus, cpus_held: float
) -> Generator[dict[str, Any], None, None]:
    shared = job.for_tasks()
    if small(job, status):
        return (make_shard(shared, job.plan.part(number)) for number in status.missing)
    parts = Lazy(job.plan.part, status.missing)
    if status.size(job.plan) <= 8 * MAKE_HERE * cores():
        return parallel_map(make_shard, shared, parts)
    return map_ordered(make_shard, shared, parts, cpus_held)


def small(job: StoreSpec, status: StoreStatus) -> bool:
    """True if the missing shards are built in this process, without Ray."""
    return len(status.missing) <= 1 or status.size(job.plan) <= MAKE_HERE


def rejected_rows(job: StoreSpec) -> Iterator[dict[str, Any]]:
    with fetched(storage.join(job.uri, REJECTED)) as path, path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


# Bytes up to which the driver scans by itself.
SCAN_HERE = 64 * 2**20


class StoreBuild:
    """A token store and the work that is left to complete it.

    Call `run`, or `start` and later `join`; with the latter, `stop` and `join` before Ray is shut down.
    """

    def __init__(self, job: StoreSpec, status: StoreStatus, limits: Limits) -> None:
        """Call `begin` instead."""
        self.store = Arrival(job.uri, job.outline())
        self.store.look()
        # The exception that ended the work of `start`.
        self.problem: Exception | None = None
        self._job = job
        self._status = status
        self._limits = limits
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._held_out: StoreBuild | None = None

    def __enter__(self) -> "StoreBuild":
        return self

    def __exit__(self, *_: object) -> None:
        # A problem was either reported already, or nobody needs it any more.
        self.stop()
        with contextlib.suppress(Exception):
            self.join()

    def check_against(self, held_out: "StoreBuild") -> None:
        """Make `run` keep held-out rows out of the training; `held_out` has a complete store.

        Copies of rows that data.eval_fraction holds out are left out. Rows of data.eval must not be training rows.
        """
        self._held_out = held_out

    def _rows(self) -> Iterator[RowDigests]:
        return (
            row_digests(read_sidecar(self._job.uri, number))
            for number in range(len(self._job.plan.shards))
        )

    def _judged(self) -> Judged:
        """Return the rows of the store, which is complete."""
        manifest = self.store.manifest
        return Judged(manifest.rows, manifest.rejected, lambda: rejected_rows(self._job))

    @property
    def plan(self) -> Plan:
        return self._job.plan

    @property
    def complete(self) -> bool:
        """True if there was nothing left to do at the start."""
        return self._status.complete

    @property
    def small(self) -> bool:
        """True if `run` takes a moment and needs no Ray."""
        return small(self._job, self._status)

    def run(self, cpus_held: float = 0.0, tell: bool = True) -> None:
        """Build what is missing, in this thread; return early after `stop`.

        `cpus_held` are CPUs that this run will take meanwhile; `tell` logs what was built. Raise UserError for data
        that cannot be used.
        """
        apart = None
        line = None
        held_out = self._held_out
        judged = NOT_JUDGED
        if self.plan.split == "train" and self.plan.eval_fraction is not None:
            assert held_out, "call check_against first"
            judged = held_out._judged()
            rows = np.unique(np.concatenate(list(held_out._rows())))
            self._job = replace(self._job, plan=replace(self.plan, held_out=rows))
        elif held_out:
            # The node keeps the result, because reading the rows of both stores, maybe a billion, takes long.
            kept = node_cache.result_path("held-apart", self.store.uri, held_out.store.uri)
            if self.complete:
                line = node_cache.read(kept)
            if line is None:
                apart = HeldOut(np.concatenate(list(held_out._rows())))
        if self.complete:
            self._judged().with_more(judged).check(self._limits)
            if apart:
                for rows in self._rows():
                    apart.meet(rows)
        else:
            stopped = self._stop.is_set
            made = make(self._job, self._status, self._limits, stopped, cpus_held, apart, judged)
            if not made:
                return
            if tell:
                _say(self._job.plan.split, self.store.manifest)
        if apart:
            line = apart.line()
            node_cache.keep(kept, line)
        if line:
            logger.warning(line)

    def start(self, cpus_held: float = 0.0) -> None:
        assert self._thread is None

        def work() -> None:
            try:
                self.run(cpus_held)
            except Exception as error:  # for `join`
                self.problem = error

        self._thread = threading.Thread(target=work, name="tokens", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the work after the current shard; the next preparation uses the finished shards."""
        self._stop.set()

    def join(self) -> None:
        """Wait until the work of `start` has ended; raise its problem."""
        if self._thread:
            self._thread.join()
        if self.problem:
            raise self.problem


def look_there(config: AnyConfig) -> Look:
    """Return a Look that reads the data that was not read before, with Ray if it is large."""
    return _look(config, _scan_there)


def look_here(config: AnyConfig) -> Look:
    """Return a Look that reads, in this process and without Ray, the data that was not read before."""
    return _look(config, _scan_here)


def begin(
    config: AnyData,
    spec: TokenizerSpec,
    split: Split,
    look: Look | None = None,
    tell: bool = True,
) -> StoreBuild:
    """List the data and the existing parts of its token store; return the StoreBuild that builds the rest.

    For both splits, pass the same `look` (by default `look_there`) to both calls. `tell` logs the existing parts. Raise
    UserError for data that cannot be used, as far as that is known before tokenising.
    """
    plan = make_plan(config, spec, split, look or look_there(config))
    root = config.run.storage
    job = StoreSpec(plan, storage.join(root, "tokens", plan.digest()), root)
    limits = Limits.of(config, split)
    status = store_status(job)
    count = len(plan.shards)
    if tell:
        for line in notes.form_lines(plan):
            logger.info(line)
        if 0 < len(status.missing) < count:
            known = count - len(status.missing)
            logger.info(f"tokens: {known:,} of {count:,} shards exist already")
    if status.manifest and status.complete and tell:
        _say(split, status.manifest, " (built earlier)")
    return StoreBuild(job, status, limits)


def _say(split: Split, manifest: Manifest, when: str = "") -> None:
    logger.info(f"tokens: {split}: {summary(manifest)}{when}")
    for line in notes.lines(manifest.notes):
        logger.info(f"tokens: {split}: {line}")


def prepare(config: AnyData, spec: TokenizerSpec, split: Split, tell: bool = True) -> TokenStore:
    """Return the complete token store of a split; first build what is missing or damaged.

    `tell` logs what exists and what is built. Needs ray.init unless the data is small. Raise UserError for data that
    cannot be used.
    """
    look = look_there(config)
    preparation = begin(config, spec, split, look, tell=tell)
    if split == "train" and config.data.eval_fraction is not None:
        held_out = begin(config, spec, "eval", look, tell=tell)
        held_out.run()
        preparation.check_against(held_out)
    preparation.run(tell=tell)
    return TokenStore.open(preparation.store.uri)


def plan_here(config: AnyData, spec: TokenizerSpec, split: Split, look: Look | None = None) -> Plan:
    """Return the plan of a split's store; its digest identifies the content.

    For both splits, pass the same `look` (by default `look_here`) to both calls. Raise UserError for missing or empty
    sources.
    """
    return make_plan(config, spec, split, look or look_here(config))


def _look(config: AnyConfig, scan_files: Callable[[Sequence[File], str], "Results"]) -> Look:
    root = config.run.storage
    look = looking(root, lambda found: _scan_all(found, root, scan_files), read_as)
    if config.data.eval_fraction is None:
        return look
    return once(look)


def scan_file(storage_root: str, file: File) -> FileScan | str:
    """Scan one file; return an error for the user as text."""
    try:
        return scan(file, storage_root)
    except UserError as error:
        return str(error)


Results = Generator[FileScan | str, None, None]


def _scan_here(files: Sequence[File], storage_root: str) -> Results:
    return (scan_file(storage_root, file) for file in files)


def _scan_there(files: Sequence[File], storage_root: str) -> Results:
    size = sum(file.size for file in files)
    if size <= SCAN_HERE:
        return _scan_here(files, storage_root)
    logger.info(f"tokens: scanning {len(files):,} files, {size / 1e9:,.1f} GB")
    return map_ordered(scan_file, storage_root, files)


def _scan_all(
    sources: Sequence[Sequence[File]],
    storage_root: str,
    scan_files: Callable[[Sequence[File], str], Results],
) -> list[list[FileScan]]:
    files = list(itertools.chain.from_iterable(sources))
    scans = kept_scans(files, storage_root)
    missing = [number for number, found in enumerate(scans) if found is None]
    with contextlib.closing(
        scan_files([files[number] for number in missing], storage_root)
    ) as results:
        for number, result in zip(missing, results, strict=True):
            if isinstance(result, str):
                raise UserError(result)
            scans[number] = result
    rest = (found for found in scans if found is not None)
    return [list(itertools.islice(rest, len(source))) for source in sources]
