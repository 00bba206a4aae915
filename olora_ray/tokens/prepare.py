"""Preparation of a token store, at once or beside the training that reads it already."""

import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.fault_points import reached
from olora_ray.common.node_cache import fetched
from olora_ray.common.storage import read_sealed, seal
from olora_ray.config.schema import AnyConfig
from olora_ray.data.reader import FileScan
from olora_ray.data.scan import forget_scan, kept_scans, scan
from olora_ray.data.sources import Changed, File, total_bytes
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens import manifest as notes
from olora_ray.tokens import ray_map
from olora_ray.tokens import shard as shards
from olora_ray.tokens.manifest import (
    MANIFEST,
    REJECTED,
    Limits,
    Manifest,
    Outline,
    RejectedRows,
    ShardInfo,
    Totals,
    file_size,
    read_manifest,
    shard_name,
    sidecar_name,
    summary,
)
from olora_ray.tokens.plan import Look, Part, Plan, Rules, Split, looking, make_plan, once, warn_of_empty
from olora_ray.tokens.store import TokenStore

logger = logging.getLogger(__name__)

# Writer of token stores: finds the shards that are missing or damaged, and makes them, spread over the cluster.


MAKE_HERE = 4 * 2**20
"""Bytes up to which the driver tokenises by itself: starting Ray Data would take longer."""
SIDECARS_AT_ONCE = 32
"""Sidecars that are read at the same time: in an object store each is a request."""
SHOWN = 4
"""Damaged files that a line names."""


@dataclass(frozen=True)
class ShardSpec:
    """What the tasks that make the shards of a store have in common; each gets its own `Part` of the plan."""

    rules: Rules
    uri: str
    storage_root: str
    """`run.storage`, where scans of files are kept."""


@dataclass(frozen=True)
class StoreSpec:
    """A store to be made."""

    plan: Plan
    uri: str
    storage_root: str
    """`run.storage`."""

    def for_tasks(self) -> ShardSpec:
        """Without the plan, which is large."""
        return ShardSpec(self.plan.rules(), self.uri, self.storage_root)

    def outline(self) -> Outline:
        """The store's outline, known before it is made."""
        files = tuple(each.file.uri for each in self.plan.files)
        return Outline(self.plan.digest(), len(self.plan.shards), self.plan.max_length, files)


@dataclass
class StoreStatus:
    """The good parts of a store, by sizes and seals; readers check the digests of shards."""

    rejected: RejectedRows
    """Those of the shards that are done."""
    manifest: Manifest | None = None
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Sidecars of the good shards without their rejected rows; none while manifest and rejected.jsonl are good."""
    missing: list[int] = field(default_factory=list)
    """Numbers of the shards to be made."""
    damaged: list[str] = field(default_factory=list)
    """Files that are there, or should be, and are not good."""
    rejected_good: bool = False

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.manifest is not None and self.rejected_good and not self.missing

    def size(self, plan: Plan) -> int:
        """Bytes of input from which the missing shards are made."""
        return sum(plan.shards[number].bytes for number in self.missing)

    def lines(self, count: int) -> list[str]:
        """Log lines about damaged and finished shards."""
        lines = []
        if self.damaged:
            more = f" and {len(self.damaged) - SHOWN:,} more" if len(self.damaged) > SHOWN else ""
            lines.append(f"tokens: damaged or lost, will be made again: {', '.join(self.damaged[:SHOWN])}{more}")
        if 0 < len(self.missing) < count:
            lines.append(f"tokens: {count - len(self.missing):,} of {count:,} shards are there already")
        return lines


def store_status(job: StoreSpec) -> StoreStatus:
    """Look at what is there of a store."""
    found = StoreStatus(RejectedRows(job.plan))
    sizes = storage.files_below(job.uri)
    if MANIFEST in sizes:
        found.manifest = _good_manifest(job)
        found.rejected_good = found.manifest is not None and _rejected_good(job, found.manifest)
        found.damaged += [] if found.manifest else [MANIFEST]
        found.damaged += [] if found.rejected_good or not found.manifest else [REJECTED]
    if found.manifest and found.rejected_good:
        wanted: Iterable[int | None] = (shard.bytes for shard in found.manifest.shards)
    else:
        wanted = _take_sidecars(job, sizes, found)
    for number, size in enumerate(wanted):
        if size is None or sizes.get(shard_name(number)) != size:
            found.done.pop(number, None)
            found.missing.append(number)
            found.damaged += [shard_name(number)] if size is not None else []
    return found


def make(
    job: StoreSpec, found: StoreStatus, limits: Limits, stopped: Callable[[], bool], cpus_held: float = 0.0
) -> bool:
    """Make what `found` lacks, in the order of the shards; False if `stopped` ended it between two.

    `cpus_held` are CPUs of the cluster that others hold for as long as this takes. Raises UserError for data
    that cannot be used, and for a shard that cannot be made again as it was.
    """
    if found.manifest and found.rejected_good:
        # The totals are known: only lost shards are made again, and no other sidecar is read.
        return _mend(job, found, found.manifest, stopped, cpus_held)
    totals = Totals(job.plan, found.rejected)
    with contextlib.closing(_made(job, found, cpus_held)) as made:
        for number in range(len(job.plan.shards)):
            if stopped():
                return False
            fresh = number not in found.done
            sidecar = _checked(job, found.manifest, number, next(made) if fresh else found.done[number])
            totals.add(sidecar, fresh)
            # Bad data ends the preparation here, not after hours of tokenising; the manifest comes last.
            if totals.hopeless(limits):
                break
    totals.rejected.write(storage.join(job.uri, REJECTED))
    if totals.reasons:
        logger.info(f"tokens: {job.plan.split}: rejected rows are listed in {storage.join(job.uri, REJECTED)}")
    totals.check(limits)
    storage.write_text(storage.join(job.uri, MANIFEST), totals.manifest().to_json())
    return True


def make_shard(job: ShardSpec, part: Part) -> dict[str, Any]:
    """Make one shard of a store and its sidecar, and return the sidecar; an error for the user is its "error".

    A shard that another preparation has finished meanwhile is taken as it is.
    """
    number = part.number
    reached("shard", number)
    sidecar = read_sealed(storage.join(job.uri, sidecar_name(number)))
    if sidecar is not None and file_size(job.uri, shard_name(number)) == sidecar["bytes"]:
        return sidecar
    try:
        shard = shards.build(job.rules, part)
    except Changed as error:
        forget_scan(error.file, job.storage_root)
        return {"error": str(error)}
    except UserError as error:
        return {"error": str(error)}
    # The sidecar after the shard: readers take a shard with a sidecar for whole.
    content = shards.file_bytes(shard.table())
    sidecar = shard.sidecar(content)
    storage.write_bytes(storage.join(job.uri, shard_name(number)), content)
    storage.write_text(storage.join(job.uri, sidecar_name(number)), seal(sidecar))
    return sidecar


def _mend(
    job: StoreSpec, found: StoreStatus, manifest: Manifest, stopped: Callable[[], bool], cpus_held: float
) -> bool:
    """Make only the missing shards of a store whose manifest is good."""
    with contextlib.closing(_made(job, found, cpus_held)) as made:
        for number in found.missing:
            if stopped():
                return False
            _checked(job, manifest, number, next(made))
    return True


def _made(job: StoreSpec, found: StoreStatus, cpus_held: float) -> Generator[dict[str, Any], None, None]:
    """The sidecars of the missing shards, in their order, as they are made."""
    if small(job, found):
        shared = job.for_tasks()
        return (make_shard(shared, job.plan.part(number)) for number in found.missing)
    parts = ray_map.Lazy(job.plan.part, found.missing)
    return ray_map.map_ordered(make_shard, job.for_tasks(), parts, cpus_held)


def small(job: StoreSpec, found: StoreStatus) -> bool:
    """Whether the missing shards are made in this process, without Ray."""
    return len(found.missing) <= 1 or found.size(job.plan) <= MAKE_HERE


def _checked(job: StoreSpec, manifest: Manifest | None, number: int, sidecar: dict[str, Any]) -> dict[str, Any]:
    """The sidecar, if it is no error and what an earlier manifest says of the shard."""
    if "error" in sidecar:
        raise UserError(sidecar["error"])
    if manifest and manifest.shards[number] != ShardInfo.of(sidecar):
        raise UserError(
            f"token store {job.uri}: {shard_name(number)}, made again, is not what it was (made by other versions of"
            " the libraries?); delete the folder to make all of it again"
        )
    return sidecar


def _good_manifest(job: StoreSpec) -> Manifest | None:
    try:
        found = read_manifest(job.uri)
    except (FileNotFoundError, ValueError):
        return None
    return found if found.digest == job.plan.digest() and len(found.shards) == len(job.plan.shards) else None


def _rejected_good(job: StoreSpec, manifest: Manifest) -> bool:
    try:
        return storage.digest_of(storage.join(job.uri, REJECTED)) == manifest.rejected_sha256
    except FileNotFoundError:
        return False


def rejected_rows(job: StoreSpec) -> Iterator[dict[str, Any]]:
    """The rejected rows of a store that is there."""
    with fetched(storage.join(job.uri, REJECTED)) as path, path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _take_sidecars(job: StoreSpec, sizes: dict[str, int], found: StoreStatus) -> Iterator[int | None]:
    """Keep the sidecars that are there as done; yields the bytes that each shard should have, None without a good one.

    Several are read at the same time, and no more than those held: each may list many rejected rows.
    """
    names = [sidecar_name(number) for number in range(len(job.plan.shards))]
    with ThreadPoolExecutor(SIDECARS_AT_ONCE) as pool:
        for start in range(0, len(names), SIDECARS_AT_ONCE):
            some = names[start : start + SIDECARS_AT_ONCE]
            read = pool.map(lambda name: read_sealed(storage.join(job.uri, name)) if name in sizes else None, some)
            for number, (name, sidecar) in enumerate(zip(some, read, strict=True), start):
                if sidecar is None:
                    found.damaged += [name] if name in sizes else []
                    yield None
                    continue
                found.rejected.put(number, sidecar.pop("rejected"))
                found.done[number] = sidecar
                yield int(sidecar["bytes"])


SCAN_HERE = 64 * 2**20
"""Bytes up to which the driver scans by itself."""


@dataclass(frozen=True)
class CompleteStore:
    """A token store that needs no more work."""

    store: TokenStore
    problem: None = None

    def join(self) -> None:
        """There is nothing to wait for."""


class StoreBuild:
    """A token store and the work that is left to complete it.

    Either `run`, or `start` and later `join`; with the latter `stop` and `join` before Ray is shut down.
    """

    def __init__(self, job: StoreSpec, found: StoreStatus, limits: Limits) -> None:
        """Use `begin`."""
        self.store = TokenStore.growing(job.uri, job.outline())
        self.problem: Exception | None = None
        """The exception that ended the work of `start`."""
        self._job, self._found, self._limits = job, found, limits
        self._stop, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "StoreBuild":
        return self

    def __exit__(self, *_: object) -> None:
        """Stop and wait for the end; a problem was either reported already, or nobody needs it any more."""
        self.stop()
        with contextlib.suppress(Exception):
            self.join()

    def contents(self) -> dict[str, str]:
        """See Plan."""
        return self._job.plan.contents()

    @property
    def complete(self) -> bool:
        """Whether there was nothing left to do when it began."""
        return self._found.complete

    @property
    def small(self) -> bool:
        """Whether `run` takes a moment and needs no Ray."""
        return small(self._job, self._found)

    @property
    def done(self) -> bool:
        """Whether the work has ended, in whatever way, or there was none."""
        return self.complete or self._ended.is_set()

    def run(self, cpus_held: float = 0.0) -> None:
        """Make what is missing, in this thread; returns early after `stop`.

        `cpus_held` are CPUs of the cluster that others hold meanwhile: where they are about all, the work
        continues without asking Ray for any. Raises UserError for data that cannot be used.
        """
        try:
            # Ray Data's stream is made, read and closed in one thread: it cannot be closed from another.
            if not self.complete and make(self._job, self._found, self._limits, self._stop.is_set, cpus_held):
                _say(self._job.plan.split, self.store.manifest)
        finally:
            self._ended.set()

    def start(self, cpus_held: float = 0.0) -> None:
        """`run` in a thread of its own."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._work, args=(cpus_held,), name="tokens", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the work after the shard that it waits for; what is made stays and is used by the next preparation."""
        self._stop.set()

    def join(self) -> None:
        """Wait until the work of `start` has ended; raises its problem."""
        if self._thread:
            self._thread.join()
        if self.problem:
            raise self.problem

    def _work(self, cpus_held: float) -> None:
        try:
            self.run(cpus_held)
        except Exception as error:  # for `join`
            self.problem = error


def look_there(config: AnyConfig) -> Look:
    """A look at the data, which reads what was not read before, with Ray if it is large."""
    return _look(config, _scan_there)


def look_here(config: AnyConfig) -> Look:
    """A look at the data by this process, without Ray; files that were scanned before are not read again."""
    return _look(config, _scan_here)


def begin(config: AnyConfig, spec: TokenizerSpec, split: Split, look: Look | None = None) -> StoreBuild:
    """Look at the data and at what is there of its token store; the StoreBuild makes the rest.

    Whoever makes both splits gives the same `look` (by default `look_there`) to both. Raises UserError for data that
    cannot be used, as far as that is known before tokenising.
    """
    plan = make_plan(config, spec, split, look or look_there(config))
    root = config.run.storage
    job = StoreSpec(plan, storage.join(root, "tokens", plan.digest()), root)
    limits = Limits.of(config, split)
    warn_of_empty(plan, limits.setting)
    found = store_status(job)
    for line in (*notes.form_lines(plan), *found.lines(len(plan.shards))):
        logger.info(line)
    if found.manifest and found.rejected_good:
        limits.check(found.manifest.rejected, found.manifest.rows, lambda: rejected_rows(job))
    if found.manifest and found.complete:
        _say(split, found.manifest, " (made before)")
    return StoreBuild(job, found, limits)


def _say(split: Split, found: Manifest, when: str = "") -> None:
    logger.info(f"tokens: {split}: {summary(found)}{when}")
    for line in notes.lines(found.notes):
        logger.info(f"tokens: {split}: {line}")


def prepare(config: AnyConfig, spec: TokenizerSpec, split: Split) -> TokenStore:
    """The complete token store of a split: opened, or what is missing or damaged of it made first.

    Needs ray.init unless the data is small. Raises UserError for data that cannot be used.
    """
    preparation = begin(config, spec, split)
    preparation.run()
    return TokenStore.open(preparation.store.uri)


def plan_here(config: AnyConfig, spec: TokenizerSpec, split: Split, look: Look | None = None) -> Plan:
    """The plan of a split's store, whose digest says what it is made of.

    Whoever makes both splits gives the same `look` (by default `look_here`) to both. Raises UserError for missing or
    empty sources.
    """
    return make_plan(config, spec, split, look or look_here(config))


def _look(config: AnyConfig, scan_files: Callable[[Sequence[File], str], "Results"]) -> Look:
    root = config.run.storage
    look = looking(root, lambda found: _scan_all(found, root, scan_files))
    return look if config.data.eval_fraction is None else once(look)


def scan_file(storage_root: str, file: File) -> FileScan | str:
    """Scan one file; an error for the user is returned as text."""
    try:
        return scan(file, storage_root)
    except UserError as error:
        return str(error)


Results = Generator[FileScan | str, None, None]


def _scan_here(files: Sequence[File], storage_root: str) -> Results:
    return (scan_file(storage_root, file) for file in files)


def _scan_there(files: Sequence[File], storage_root: str) -> Results:
    """Scans by tasks of Ray, if they would take long here."""
    if (size := total_bytes(files)) <= SCAN_HERE:
        return _scan_here(files, storage_root)
    logger.info(f"tokens: scanning {len(files):,} files, {size / 1e9:,.1f} GB")
    return ray_map.map_ordered(scan_file, storage_root, files)


def _scan_all(
    sources: Sequence[Sequence[File]], storage_root: str, scan_files: Callable[[Sequence[File], str], Results]
) -> list[list[FileScan]]:
    """The scans of the files of each source; only those that are not kept are made, by `scan_files`."""
    files = [file for source in sources for file in source]
    scans = kept_scans(files, storage_root)
    missing = [number for number, found in enumerate(scans) if found is None]
    with contextlib.closing(scan_files([files[number] for number in missing], storage_root)) as results:
        for number, result in zip(missing, results, strict=True):
            if isinstance(result, str):
                raise UserError(result)
            scans[number] = result
    rest = (found for found in scans if found is not None)
    return [list(itertools.islice(rest, len(source))) for source in sources]
