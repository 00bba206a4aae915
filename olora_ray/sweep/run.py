"""A search: Ray Tune over trainings that share tokens, factors and the base's evaluation.

<storage>/<name>/
    trials/trial-007/                          a run folder like any other
    shared/                                    factors of each method, what the base model does
    tune/ search.json progress.json            see search_folder.py
    best.yaml leaderboard.json report.html *.png
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from olora_ray.cluster import preflight, resources, shared_base
from olora_ray.cluster.resources import PlacementRequest, free_workers, worker_resources
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.load import flatten, override
from olora_ray.config.schema import Config
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

MICRO = "train.micro_batch"


def train_spec(config: Config, space: Space, base: Base) -> tuple[TrainSpec, float]:
    """The specification that all trials vary, and the seconds its tokens took.

    Raises UserError for a score as the metric that no trial would have: each would say so after its training.
    """
    began = time.monotonic()
    prepared = prepare_tokens(config, base, wait=True)
    spec, seconds = prepared.spec, time.monotonic() - began
    _check_score(config, space, prepared.scores)
    largest = max(space.possible(MICRO, config.train.micro_batch))
    if spec.recompute or largest <= config.train.micro_batch:
        return spec, seconds
    # In all trials or in none, since it changes no number; in one that does not need it, it costs time alone.
    if again := preflight.recomputes(override(config, {MICRO: largest}), base.model):
        logger.info(
            "train.activation_checkpointing: auto: blocks are run again in the backward pass: a trial with"
            f" {MICRO}={largest} would not fit"
        )
    return replace(spec, recompute=again), seconds


def _check_score(config: Config, space: Space, names: Collection[str]) -> None:
    wanted = space.metric.removeprefix("score/")
    if wanted == space.metric or wanted in names:
        return
    given = ", ".join(f"score/{name}" for name in sorted(names)) or "nothing"
    raise UserError(
        f"metric: {space.metric} is not measured: {config.evaluation.scorer} gives {given} for the held-out rows"
        " that are answered"
    )


def share(spec: TrainSpec, space: Space, seconds: float) -> tuple[TrainSpec, float]:
    """Make what the trials share; returns the spec that knows of it, and the seconds each trial is spared.

    `seconds` is what the tokens took. Raises UserError for a rank or targets that the model does not have, and for
    a search that was begun with another model or other data.
    """
    search_folder.begin(spec.config, space, spec.base_identity())
    place = storage.join(spec.config.folder(), "shared")
    kinds = shared_work.kinds(spec.config, space)
    made = shared_work.made(spec, place, kinds, "what all trials share")
    spared = seconds + made.init / max(1, len(kinds)) + made.base
    logger.info(
        f"shared by all trials: tokens {seconds:.1f} s, {_shown(kinds)} {made.init:.1f} s, the base model on the"
        f" held-out rows {made.base:.1f} s; each trial is spared {spared:.1f} s"
    )
    return replace(spec, shared=place), spared


def _shown(kinds: Sequence[shared_work.Kind]) -> str:
    return ", ".join(f"{method} factors at rank {rank}" for method, rank in kinds) or "no factors"


@contextlib.contextmanager
def tracked(spec: TrainSpec, space: Space) -> Iterator[Tracker]:
    """The search's own MLflow run, the parent of its trials' runs."""
    config = spec.config
    tags = {"olora.kind": "search", "olora.base_digest": spec.base.digest}
    params = flatten(config) | {f"space.{name}": str(value) for name, value in space.model_dump().items()}
    with start.mlflow_run(config, tags, RunFolder(config), params, after_error="KILLED") as tracker:
        yield tracker


def run(spec: TrainSpec, space: Space, spared: float, tracker: Tracker) -> tuple[SweepSpec, SearchRecord]:
    """Search until all trials have ended, or a limit of the space is reached; resumes one that was interrupted.

    Raises UserError if not even one trial fits in the cluster, or if none of them has measured the metric.
    """
    config = spec.config
    sweep_spec = SweepSpec(config.run.name, config.folder(), spec, space, tracker.run_id, spared)
    search(sweep_spec)
    found = outcome.record(sweep_spec)
    if found.best() is None:
        raise UserError(
            f"no trial has measured {space.metric}: {_reasons(found)}; remove the cause, and choose another run.name"
            f" or delete {sweep_spec.folder}"
        )
    return sweep_spec, found


def _reasons(found: SearchRecord) -> str:
    """Why trials have failed, the most frequent reasons first."""
    counts = Counter(trial.reason for trial in found.trials if trial.reason).most_common()
    if not counts:
        return f"{plural(len(found.trials), 'trial')} ran"
    shown = [f"{reason} ({plural(number, 'trial')})" for reason, number in counts[:3]]
    return "; ".join([*shown, *([f"{len(counts) - 3} other reasons"] if len(counts) > 3 else [])])


def search(sweep_spec: SweepSpec) -> None:
    """Run the trials that have not ended; none of a search that is over.

    Raises UserError if not even one trial fits in the cluster.
    """
    if search_folder.progress(sweep_spec.folder).complete:
        logger.info("search: it has ended; its trials are reported, none is run")
    else:
        _search(sweep_spec)


def _search(sweep_spec: SweepSpec) -> None:
    """Run the trials that have not ended; raises UserError if Tune cannot resume."""
    folder, space = sweep_spec.folder, sweep_spec.space
    concurrent, shared_bases = _concurrent_trials(sweep_spec)
    callback = tuner.SweepCallback(folder, space)
    place = start.everywhere(sweep_spec.train_spec.config)
    travelling = replace(sweep_spec, shared_bases=shared_bases, tracking=place)
    ended = tuner.build(travelling, callback, concurrent).fit()
    # A search may have come to its limit and been killed before that was noted: Tune resumes it with nothing to do.
    if len(ended) < space.count() and not callback.stop_all():
        raise search_folder.not_resumed(folder)
    note = f"The search ended early: {callback.over}." if callback.over else ""
    cut = tuple(sorted(callback.cut))
    search_folder.keep(folder, Progress(callback.seconds(), callback.complete(), note, cut))
    # Not after an error or a signal: trials would find their shared base dead and end as failed before they
    # are ended with this process.
    shared_base.end_actors(shared_bases)


def _concurrent_trials(sweep_spec: SweepSpec) -> tuple[int, tuple[Any, ...]]:
    """How many trials run at the same time, and the actors that train them where several share one base model.

    Side by side, or one after the other: then what is saved is the start of each, which takes longer than a short
    training.
    """
    spec, space = sweep_spec.train_spec, sweep_spec.space
    config, count = spec.config, space.count()
    wanted, workers = worker_resources(config), config.cluster.min_workers()
    fitting = _fitting(wanted, workers)
    each, asked = min(space.trials_per_worker, count), min(space.concurrency or count, count)
    if config.cluster.max_workers() > 1 or not sweep_spec.shares_data():
        concurrent = min(fitting // workers, asked)
        logger.info(f"search: {count} trials, {concurrent} at the same time, {workers} worker(s) each")
        return concurrent, ()
    number = min(fitting, -(-asked // each))
    side = f"up to {each} side by side" if each > 1 else "one after the other"
    copies = "one copy" if number == 1 else f"each of {number} copies"
    logger.info(f"search: {count} trials, {side} on {copies} of the base model")
    return min(number * each, asked), shared_base.start_actors(spec, wanted, number, each)


def _fitting(wanted: Mapping[str, float], workers: int) -> int:
    """Workers that fit; waits where a trial needs more nodes than there are, and the autoscaler may start them.

    Raises UserError if not even one trial fits, and none will.
    """
    fitting = room(wanted)
    if fitting >= workers:
        return fitting
    there, most = (resources.room(wanted, nodes) for nodes in (resources.present(), resources.maximum()))
    if not there < workers <= most:
        raise UserError(
            f"cluster.workers={workers}: a trial needs {workers} workers, and there is room for {fitting} now"
        )
    logger.info(f"search: waits for the cluster to grow: a trial needs {workers} workers, there is room for {fitting}")
    with PlacementRequest(wanted, workers, after=3.0) as request:
        while (fitting := free_workers(wanted)) < workers:
            request.look()
            time.sleep(0.5)
    return fitting


def room(wanted: Mapping[str, float]) -> int:
    """Workers that fit; tasks that have ended give back what they held a moment later."""
    seen = []
    for _ in range(8):
        seen.append(free_workers(wanted))
        time.sleep(0.25)
    return max(seen)
