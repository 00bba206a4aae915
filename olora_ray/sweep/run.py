"""A search: Ray Tune over trainings that share tokens, factors and the base model's evaluation.

<storage>/<name>/
    trials/trial-007/                          a run folder, like that of any other run
    shared/                                    factors of each method, results of the base model
    tune/ search.json progress.json            see search_folder.py
    best.yaml leaderboard.json report.html *.png
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from olora_ray.cluster import resources, shared_base
from olora_ray.cluster.decide import Decided, with_room_for
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.cluster.resources import PlacementRequest, free_workers, worker_resources
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.decided import Decisions
from olora_ray.config.load import flatten
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.prepare import prepare_tokens
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.sweep import outcome, search_folder, shared_work, tuner
from olora_ray.sweep.record import SearchRecord
from olora_ray.sweep.search_folder import Progress
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import SweepSpec
from olora_ray.tracking import start
from olora_ray.tracking.run import Tracker

logger = logging.getLogger(__name__)


def train_spec(
    decided: Decided, space: Space, base: Base, cluster: ClusterFacts
) -> tuple[TrainSpec, float]:
    """Return the specification that all trials vary, and the seconds of preparing its tokens.

    Raises UserError if the metric is a score that no trial would have: otherwise only a finished trial would say so.
    """
    began = time.monotonic()
    largest = max(space.possible("train.micro_batch", decided.config.train.micro_batch))
    decided = with_room_for(decided, largest, base.model, cluster)
    prepared = prepare_tokens(
        decided.config, base, decided.size.total_bytes(), decided.decisions, wait=True
    )
    wanted = space.metric.removeprefix("score/")
    if wanted != space.metric and wanted not in prepared.scores:
        given = ", ".join(f"score/{name}" for name in sorted(prepared.scores)) or "nothing"
        raise UserError(
            f"metric: {space.metric} is not measured: {decided.config.evaluation.scorer} returns {given} for the"
            " answers to the held-out rows; set another metric"
        )
    return prepared.spec, time.monotonic() - began


def share(
    spec: TrainSpec, space: Space, seconds: float, decisions: Decisions
) -> tuple[TrainSpec, float]:
    """Make what the trials share. Return the spec that points to it, and the seconds saved per trial.

    `seconds` is the time of the tokens. Raises UserError for a rank or targets that the model does not have, and for a
    search that started with another model or other data.
    """
    search_folder.begin(spec.config, space, spec.base_identity(), decisions)
    folder = storage.join(spec.config.folder(), "shared")
    kinds = shared_work.factor_keys(spec.config, space)
    work = shared_work.made(spec, folder, kinds, "what all trials share")
    spared = seconds + work.init / max(1, len(kinds)) + work.base
    made = ", ".join(f"{method} factors at rank {rank}" for method, rank in kinds) or "no factors"
    logger.info(
        f"shared by all trials: tokens {seconds:.1f} s, {made} {work.init:.1f} s, the base model on the"
        f" held-out rows {work.base:.1f} s; each trial is spared {spared:.1f} s"
    )
    return replace(spec, shared=folder), spared


@contextlib.contextmanager
def tracked(spec: TrainSpec, space: Space) -> Iterator[Tracker]:
    config = spec.config
    tags = {"olora.kind": "search", "olora.base_digest": spec.base.digest}
    params = flatten(config) | {
        f"space.{name}": str(value) for name, value in space.model_dump().items()
    }
    with start.mlflow_run(
        config, tags, RunFolder(config.folder()), params, after_error="KILLED"
    ) as tracker:
        yield tracker


def run(
    spec: TrainSpec, space: Space, spared: float, tracker: Tracker, decisions: Decisions
) -> tuple[SweepSpec, SearchRecord]:
    """Run the search until all trials have ended or a limit of the space is reached; resume an interrupted one.

    Raises UserError if not even one trial fits in the cluster, or if no trial has measured the metric.
    """
    config = spec.config
    sweep_spec = SweepSpec(
        config.run.name,
        config.folder(),
        spec,
        space,
        tracker.run_id,
        spared,
        decisions=decisions,
    )
    search(sweep_spec)
    record = outcome.record(sweep_spec)
    if record.best() is None:
        causes = Counter(trial.reason for trial in record.trials if trial.reason).most_common()
        shown = [f"{cause} ({plural(number, 'trial')})" for cause, number in causes[:3]]
        if len(causes) > 3:
            shown.append(f"{len(causes) - 3} other reasons")
        reasons = "; ".join(shown) or f"{plural(len(record.trials), 'trial')} ran"
        raise UserError(
            f"metric: no trial has measured {space.metric}: {reasons}; remove the cause, then set another run.name or"
            f" delete {sweep_spec.folder}"
        )
    return sweep_spec, record


def search(sweep_spec: SweepSpec) -> None:
    """Run the trials that have not ended.

    Raises UserError if not even one trial fits in the cluster, or if Tune cannot resume.
    """
    folder = sweep_spec.folder
    space = sweep_spec.space
    if search_folder.progress(folder).complete:
        logger.info("search: already complete; no trial runs, the report is written again")
        return
    concurrent, shared_bases = _concurrent_trials(sweep_spec)
    callback = tuner.SweepCallback(folder, space)
    tracking_uri = start.everywhere(sweep_spec.train_spec.config)
    travelling = replace(sweep_spec, shared_bases=shared_bases, tracking=tracking_uri)
    results = tuner.build(travelling, callback, concurrent).fit()
    # A killed search may have reached its limit before progress.json said so. Then Tune resumes it and has nothing to
    # do, which is no failure.
    if len(results) < space.count() and not callback.stop_all():
        raise search_folder.not_resumed(folder)
    progress = Progress(
        callback.seconds(),
        callback.complete(),
        f"The search ended early: {callback.over}." if callback.over else "",
        tuple(sorted(callback.cut)),
    )
    search_folder.keep(folder, progress)
    # Not after an error or a signal: the trials would lose their shared base model, and be recorded as failed before
    # this process ends them.
    shared_base.end_actors(shared_bases)


def _concurrent_trials(sweep_spec: SweepSpec) -> tuple[int, tuple[Any, ...]]:
    """Return how many trials run at the same time, and the actors for trials that share one base model."""
    space = sweep_spec.space
    config = sweep_spec.train_spec.config
    wanted = worker_resources(config)
    workers = config.cluster.fewest
    fitting = _fitting(wanted, workers)
    count = space.count()
    asked = min(space.concurrency or count, count)
    if config.cluster.most > 1 or not sweep_spec.shares_data():
        concurrent = min(fitting // workers, asked)
        logger.info(
            f"search: {space.in_words()}, {concurrent} at the same time, {plural(workers, 'worker')} per trial"
        )
        return concurrent, ()
    # The actors serve trials that run one after another, too: they save the start of each trial, which takes longer
    # than a short training.
    each = min(space.trials_per_worker, count)
    number = min(fitting, -(-asked // each))
    side = f"up to {each} side by side" if each > 1 else "one after the other"
    copies = "one copy" if number == 1 else f"each of {number} copies"
    logger.info(f"search: {space.in_words()}, {side} on {copies} of the base model")
    actors = shared_base.start_actors(sweep_spec.train_spec, wanted, number, each)
    return min(number * each, asked), actors


def _fitting(wanted: Mapping[str, float], workers: int) -> int:
    """Return how many workers fit; wait for the autoscaler if a trial needs more nodes than the cluster has now.

    Raises UserError if not even one trial fits, and the cluster cannot grow enough.
    """
    fitting = room(wanted)
    if fitting >= workers:
        return fitting
    now, most = resources.rooms(wanted)
    if not now < workers <= most:
        raise UserError(
            f"cluster.workers={workers}: a trial needs {workers}, but the cluster has room for {fitting}; set it lower"
        )
    logger.info(
        f"search: waiting for more nodes: a trial needs {workers} workers, the cluster has room for {fitting}"
    )
    with PlacementRequest(wanted, workers, after=3.0) as request:
        while (fitting := free_workers(wanted)) < workers:
            request.look()
            time.sleep(0.5)
    return fitting


def room(wanted: Mapping[str, float]) -> int:
    # Tasks that have just ended give their CPUs and GPUs back a moment later.
    seen = []
    for _ in range(8):
        seen.append(free_workers(wanted))
        time.sleep(0.25)
    return max(seen)
