"""Preparation of a token store, at once or beside the training that reads it already."""

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.evaluation import AnyConfig
from olora_ray.data.kept_scans import find_all
from olora_ray.data.scan import scan
from olora_ray.data.sources import File, total_bytes
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.data.units import FileScan
from olora_ray.tokens import notes, ray_map, writer
from olora_ray.tokens.draws import warn_of_empty
from olora_ray.tokens.manifest import Manifest
from olora_ray.tokens.plan import Look, Plan, Split, looking, make_plan, once
from olora_ray.tokens.store import TokenStore
from olora_ray.tokens.totals import Limits, summary

logger = logging.getLogger(__name__)

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

    def __init__(self, job: writer.StoreSpec, found: writer.StoreStatus, limits: Limits) -> None:
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
        return writer.small(self._job, self._found)

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
            if not self.complete and writer.make(self._job, self._found, self._limits, self._stop.is_set, cpus_held):
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
    job = writer.StoreSpec(plan, storage.join(root, "tokens", plan.digest()), root)
    limits = Limits.of(config, split)
    warn_of_empty(plan, limits.setting)
    found = writer.store_status(job)
    for line in (*notes.form_lines(plan), *found.lines(len(plan.shards))):
        logger.info(line)
    if found.manifest and found.rejected_good:
        limits.check(found.manifest.rejected, found.manifest.rows, lambda: writer.rejected_rows(job))
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
    scans = find_all(files, storage_root)
    missing = [number for number, found in enumerate(scans) if found is None]
    with contextlib.closing(scan_files([files[number] for number in missing], storage_root)) as results:
        for number, result in zip(missing, results, strict=True):
            if isinstance(result, str):
                raise UserError(result)
            scans[number] = result
    rest = (found for found in scans if found is not None)
    return [list(itertools.islice(rest, len(source))) for source in sources]
