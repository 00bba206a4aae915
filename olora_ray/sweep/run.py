"""A search: Ray Tune over trainings that share tokens, factors and the base's evaluation.

<storage>/<name>/
    trials/trial-007/                          a run folder like any other
    shared/                                    factors at the largest rank, what the base model does
    tune/ tune.json                            Tune's state, from which an interrupted search resumes; its format
    best.yaml leaderboard.json report.html *.png
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from olora_ray.cluster import address, shared_base
from olora_ray.cluster.resources import free_workers, worker_resources
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.dotted import flatten
from olora_ray.config.load import dump, override
from olora_ray.config.schema import Config
from olora_ray.pipeline import connection, export, fit, mlflow_run, publish
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.prepare import prepare_tokens
from olora_ray.pipeline.run_folder import RunFolder, bound_settings
from olora_ray.sweep import shared_work, state, trial_file, tuner
from olora_ray.sweep.callback import SweepCallback
from olora_ray.sweep.record import SearchRecord, TrialRecord
from olora_ray.sweep.report import leaderboard, write
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import SweepSpec, trial_name
from olora_ray.tracking import mlflow_run as tracking
from olora_ray.tracking.run import Tracker
from olora_ray.train import checkpoint, checkpoints

logger = logging.getLogger(__name__)

SEARCH = "search.json"
"""File of the settings and space that a search was begun with."""
LENGTH = ("train.steps", "train.epochs", "train.eval_every", "train.checkpoint_every", "evaluation.")
"""Fields that a space sets to have short trials."""


def search_config(config: Config, space: Space, space_file: str | Path, registers: bool) -> Config:
    """The config of the search: under the name `<run.name>-<name of the space file>`, with what the space sets.

    A range of workers becomes a fixed number, its smallest. Raises UserError if `registers` and no name is given.
    """
    if registers and config.registry.model is None:
        raise UserError("registry.model: not set, so there is no name to register the best model under")
    own = {"run.name": f"{config.run.name}-{Path(space_file).stem}", "cluster.workers": config.cluster.min_workers()}
    if space.trials_per_worker > 1:
        own |= {"cluster.workers": 1}
    return override(config, {**space.set, **own})


def check(config: Config, space: Space) -> None:
    """Raise UserError if storage, MLflow or Ray cannot be used, or what has this name is no search to resume."""
    folder = RunFolder(config)
    folder.check()
    mlflow_run.check_tracking(config, folder)
    kept, now = _kept(folder.root), _description(config, space)
    if kept and (bound_settings(kept["config"]), kept["space"]) != (now["config"], now["space"]):
        raise UserError(
            f"run.name: {folder.root} holds a search with different settings; choose another run.name or space file,"
            " or delete it"
        )
    state.can_resume(folder.root)
    address.find()


def train_spec(config: Config, base: Base) -> tuple[TrainSpec, float]:
    """The specification that all trials vary, and the seconds its tokens took."""
    began = time.monotonic()
    spec, _ = prepare_tokens(config, base, wait=True)
    return spec, time.monotonic() - began


def share(spec: TrainSpec, space: Space, seconds: float) -> tuple[TrainSpec, float]:
    """Make what the trials share; returns the spec that knows of it, and the seconds each trial is spared.

    `seconds` is what the tokens took. Raises UserError for a rank or targets that the model does not have, and for
    a search that was begun with another model or other data.
    """
    folder, contents = spec.config.folder(), spec.base_identity()
    checkpoint.require_same({**contents, **_kept(folder).get("contents", {})}, contents, folder)
    description = {**_description(spec.config, space), "contents": contents}
    storage.write_text(storage.join(folder, SEARCH), json.dumps(description, indent=1, sort_keys=True) + "\n")
    place = storage.join(spec.config.folder(), "shared")
    rank = max(_ranks(space) or [spec.config.adapter.rank])
    wanted = worker_resources(spec.config)
    make = ray.remote(shared_work.make).options(num_cpus=wanted["CPU"], num_gpus=wanted.get("GPU", 0))
    with connection.user_errors():
        init, base = ray.get(make.remote(spec, place, rank))
    spared = seconds + init + base
    logger.info(
        f"shared by all trials: tokens {seconds:.1f} s, {spec.config.adapter.method} factors at rank {rank}"
        f" {init:.1f} s, the base model on the held-out rows {base:.1f} s; each trial is spared {spared:.1f} s"
    )
    return replace(spec, shared=place), spared


@contextlib.contextmanager
def tracked(spec: TrainSpec, space: Space) -> Iterator[Tracker]:
    """The search's own MLflow run, the parent of its trials' runs."""
    config = spec.config
    tags = {"olora.kind": "search", "olora.base_digest": spec.base.digest}
    params = flatten(config) | {f"space.{name}": str(value) for name, value in space.model_dump().items()}
    with tracking.mlflow_run(config, tags, RunFolder(config), params, after_error="KILLED") as tracker:
        yield tracker


def run(spec: TrainSpec, space: Space, spared: float, tracker: Tracker) -> tuple[SweepSpec, SearchRecord]:
    """Search until all trials have ended, or a limit of the space is reached; resumes one that was interrupted.

    Of one that another version of this code has ended the trials are read and none is run. Raises UserError if not
    even one trial fits in the cluster, or if none of them has measured the metric.
    """
    config = spec.config
    sweep_spec = SweepSpec(config.run.name, config.folder(), spec, space, tracker.run_id, spared)
    notes, seconds = tuple[str, ...](), 0.0
    if state.can_resume(sweep_spec.folder):
        notes, seconds = _search(sweep_spec)
    else:
        logger.info("search: another version of olora_ray has ended it; its trials are reported, none is run")
    found = record(sweep_spec, seconds, notes)
    if found.best() is None:
        reasons = sorted({trial.reason for trial in found.trials if trial.reason})
        raise UserError(
            f"no trial has measured {space.metric}: {'; '.join(reasons) or f'{len(found.trials)} trials ran'}"
        )
    return sweep_spec, found


def _search(sweep_spec: SweepSpec) -> tuple[tuple[str, ...], float]:
    """Run the trials that have not ended; returns why the search has ended early, if it has, and the seconds."""
    space = sweep_spec.space
    concurrent, shared_bases = _concurrent_trials(sweep_spec.train_spec, space)
    callback = SweepCallback(sweep_spec.folder, space, sweep_spec.total())
    began = time.monotonic()
    tuner.build(replace(sweep_spec, shared_bases=shared_bases), callback, concurrent).fit()
    seconds = time.monotonic() - began
    # Not after an error or a signal: trials would find their shared base dead and end as failed before they
    # are ended with this process.
    shared_base.end_actors(shared_bases)
    if callback.over:
        return (f"The search ended early: {callback.over}.",), seconds
    ended = sum(1 for trial in trial_file.read_all(sweep_spec.folder).values() if trial.status != "unfinished")
    if space.time_budget and ended < space.count():
        note = f"The time budget of {space.time_budget:g} s was used up: {ended} of {space.count()} trials ended."
        return (note,), seconds
    return (), seconds


def record(sweep_spec: SweepSpec, seconds: float, notes: tuple[str, ...] = ()) -> SearchRecord:
    """What the trials have left in their folders, as one record."""
    space = sweep_spec.space
    trials = tuple(found for _, found in sorted(trial_file.read_all(sweep_spec.folder).items()))
    return SearchRecord(
        name=sweep_spec.name,
        metric=space.metric,
        mode=space.better(),
        searcher=space.searcher,
        scheduler=space.scheduler.kind,
        seconds=seconds,
        trials=trials,
        fields=tuple(space.search),
        default=next((trial.number for trial in trials if _is_default(trial, sweep_spec)), None),
        notes=notes,
    )


def conclude(config: Config, sweep_spec: SweepSpec, found: SearchRecord, tracker: Tracker) -> None:
    """Write report, leaderboard and best.yaml, log them to MLflow, and say what came out."""
    best = found.best()
    assert best is not None
    place = storage.join(sweep_spec.folder, "best.yaml")
    storage.write_text(place, dump(best_config(config, sweep_spec, best)))
    for file in [*write.write(found, sweep_spec.folder), place]:
        with storage.fetched(file) as local:
            tracker.artifact(local)
    tracker.table("leaderboard", *leaderboard.table(found))
    tracker.metrics({0: {f"best/{found.metric}": best.value or 0.0}})
    for line in [*leaderboard.lines(found), *leaderboard.summary(found)]:
        logger.info(line)
    logger.info(f"report: {storage.join(sweep_spec.folder, 'report.html')}")
    logger.info(f"best config: {place}")


def best_config(config: Config, sweep_spec: SweepSpec, best: TrialRecord, refit: bool = False) -> Config:
    """The config as it came, with the best trial's values and what the space sets for all.

    For a `refit` the space's short trainings are left out: it has the length of the config itself.
    """
    common = {field: value for field, value in sweep_spec.space.set.items() if not (refit and field.startswith(LENGTH))}
    name = f"{sweep_spec.name}-{'refit' if refit else 'best'}"
    return override(config, {**common, **best.params, "run.name": name})


def register(sweep_spec: SweepSpec, found: SearchRecord) -> int:
    """Export, check and register the best trial's model as it is; returns the version.

    Raises UserError if the exports disagree.
    """
    best = found.best()
    assert best is not None
    trial = override(
        sweep_spec.train_spec.config, {**best.params, "run.name": f"{sweep_spec.name}-{trial_name(best.number)}"}
    )
    spec = replace(sweep_spec.train_spec, config=trial)
    folder = RunFolder(trial, best.folder)
    result = fit.finished_training(spec, folder) or _stopped(folder)
    with mlflow_run.tracked(spec, folder, sweep_spec.parent) as tracker:
        parity = export.run_export(spec, folder, result)
        tags = {"olora.search": sweep_spec.name, "olora.trial": str(best.number)}
        version = publish.publish(spec, folder, tracker, result, parity, tags)
    assert version is not None
    name, alias = trial.registry.model, trial.registry.alias
    logger.info(f"registered: {name} version {version} (models:/{name}@{alias}), trial {best.number}")
    return version


def _stopped(folder: RunFolder) -> TrainResult:
    """The result of a trial that was stopped: what its last checkpoint has."""
    found = checkpoints.latest_good(folder.checkpoints)
    if found is None:
        raise UserError(
            f"{folder.checkpoints}: the best trial has no checkpoint left; train best.yaml instead (--refit)"
        )
    return TrainResult(state=found[1].state, stopped_early=True)


def _concurrent_trials(spec: TrainSpec, space: Space) -> tuple[int, tuple[Any, ...]]:
    """How many trials run at the same time, and the actors that train them where several share one base model."""
    config, count = spec.config, space.count()
    wanted, workers = worker_resources(config), config.cluster.min_workers()
    room = _room(wanted)
    if room < workers:
        raise UserError(f"cluster.workers={workers}: a trial needs {workers} workers, and there is room for {room} now")
    each = space.trials_per_worker
    if each == 1:
        concurrent = min(room // workers, space.concurrency or count, count)
        logger.info(f"search: {count} trials, {concurrent} at the same time, {workers} worker(s) each")
        return concurrent, ()
    number = min(room, -(-min(space.concurrency or count, count) // each))
    logger.info(f"search: {count} trials, up to {each} side by side on each of {number} copies of the base model")
    return min(number * each, count), shared_base.start_actors(spec, wanted, number, each)


def _room(wanted: Mapping[str, float]) -> int:
    """Workers that fit; tasks that have ended give back what they held a moment later."""
    seen = []
    for _ in range(8):
        seen.append(free_workers(wanted))
        time.sleep(0.25)
    return max(seen)


def _description(config: Config, space: Space) -> dict[str, Any]:
    """What a search is bound to, but for the contents of model and data, as JSON would give it back."""
    # How many trials there are, and how many at once, may change between two attempts.
    chosen = space.model_dump(exclude={"concurrency", "time_budget", "patience", "min_improvement"})
    described: dict[str, Any] = json.loads(json.dumps({"config": bound_settings(flatten(config)), "space": chosen}))
    return described


def _kept(folder: str) -> dict[str, Any]:
    """What the search in a folder was begun with; empty if there is none, unlike any if it does not read."""
    place = storage.join(folder, SEARCH)
    try:
        kept = json.loads(storage.read_text(place)) if storage.exists(place) else {}
        return {"config": {}, "space": {}, **kept} if kept else {}
    except (ValueError, TypeError):
        return {"config": {}, "space": {}}


def _is_default(trial: TrialRecord, sweep_spec: SweepSpec) -> bool:
    if sweep_spec.space.has_default():
        return trial.number == 0
    draws = sweep_spec.space.as_draws(sweep_spec.train_spec.config)
    return draws is not None and trial.params == sweep_spec.space.values(draws)


def _ranks(space: Space) -> list[int]:
    domain = space.search.get("adapter.rank")
    return [int(value) for value in domain.extremes()] if domain else []
