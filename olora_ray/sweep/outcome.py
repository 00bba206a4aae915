"""The outcome of a search: its record, what is written and said of it, and the best trial as a registered model."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from olora_ray.cluster.spec import TrainResult
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.load import dump, override
from olora_ray.config.schema import Config
from olora_ray.pipeline import fit, run
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.sweep import search_folder
from olora_ray.sweep.record import SearchRecord, TrialRecord, read_all
from olora_ray.sweep.report import page, text
from olora_ray.sweep.search_folder import Progress
from olora_ray.sweep.spec import SweepSpec, trial_name
from olora_ray.sweep.trial import trial_spec
from olora_ray.tracking.run import Tracker
from olora_ray.train import checkpoints

logger = logging.getLogger(__name__)

LENGTH = ("train.steps", "train.epochs", "train.eval_every", "train.checkpoint_every")
"""Fields that a space sets to have short trials."""
MEASURE = "evaluation."
"""How its trials are looked at is the space's: the config's gate may ask for a score that they do without."""


def record(sweep_spec: SweepSpec) -> SearchRecord:
    """What the trials have left in their folders, and the search in its own, as one record."""
    space, found = sweep_spec.space, search_folder.progress(sweep_spec.folder)
    trials = tuple(
        _with_reason(trial, found, space.scheduler.kind) for _, trial in sorted(read_all(sweep_spec.folder).items())
    )
    return SearchRecord(
        name=sweep_spec.name,
        metric=space.metric,
        mode=space.better(),
        searcher=space.searcher,
        scheduler=space.scheduler.kind,
        seconds=found.seconds,
        trials=trials,
        fields=tuple(space.search),
        default=_default(sweep_spec, trials),
        notes=(found.note,) if found.note else (),
    )


def _with_reason(trial: TrialRecord, found: Progress, scheduler: str) -> TrialRecord:
    """A trial that was stopped does not know by whom, and one whose process was ended could not say so."""
    if trial.status == "stopped" and trial.total and trial.step >= trial.total:  # it was faster than the decision
        return replace(trial, status="finished")
    if trial.status in ("stopped", "unfinished") and trial.number in found.cut:
        return replace(trial, status="unfinished", reason="the search ended before it")
    if trial.status != "stopped":
        return trial
    share = f" after {trial.step / trial.total:.0%} of its {plural(trial.total, 'step')}" if trial.total else ""
    return replace(trial, reason=f"{scheduler}{share}")


def conclude(config: Config, sweep_spec: SweepSpec, found: SearchRecord, tracker: Tracker) -> None:
    """Write report, leaderboard and best.yaml, log them to MLflow, and say what came out."""
    best = found.best()
    assert best is not None
    place = storage.join(sweep_spec.folder, "best.yaml")
    storage.write_text(place, dump(best_config(config, sweep_spec, best)))
    for file in [*page.write(found, sweep_spec.folder), place]:
        with node_cache.fetched(file) as local:
            tracker.artifact(local)
    tracker.table("leaderboard", *text.table(found))
    tracker.metrics({0: {f"best/{found.metric}": best.value or 0.0}})
    for line in [*text.lines(found), *text.summary(found)]:
        logger.info(line)
    logger.info(f"report: {storage.join(sweep_spec.folder, 'report.html')}")
    logger.info(f"best config: {place}")


def best_config(config: Config, sweep_spec: SweepSpec, best: TrialRecord, refit: bool = False) -> Config:
    """The config as it came, with the best trial's values and what the space sets for all but how they are measured.

    For a `refit` the space's short trainings are left out: it has the length of the config itself.
    """
    left = (MEASURE, *LENGTH) if refit else MEASURE
    common = {field: value for field, value in sweep_spec.space.set.items() if not field.startswith(left)}
    name = f"{sweep_spec.name}-{'refit' if refit else 'best'}"
    return override(config, {**common, **best.params, "run.name": name})


def register(sweep_spec: SweepSpec, found: SearchRecord) -> int:
    """Export, check and register the best trial's model as it is; returns the version.

    Raises UserError if the exports disagree, and for a trial whose best adapter is lost.
    """
    best = found.best()
    assert best is not None
    trial = override(
        sweep_spec.train_spec.config, {**best.params, "run.name": f"{sweep_spec.name}-{trial_name(best.number)}"}
    )
    spec = trial_spec(sweep_spec, trial)
    folder = RunFolder(trial, best.folder)
    result = fit.finished_training(spec, folder) or _stopped(folder, best, found.metric)
    tags = {"olora.search": sweep_spec.name, "olora.trial": str(best.number)}
    version = run.register(spec, folder, result, tags, sweep_spec.parent)
    assert version is not None
    name, alias = trial.registry.model, trial.registry.alias
    logger.info(f"registered: {name} version {version} (models:/{name}@{alias}), trial {best.number}")
    return version


def _stopped(folder: RunFolder, best: TrialRecord, metric: str) -> TrainResult:
    """The result of a trial that did not come to its end: what its last checkpoint has.

    Raises UserError if that is not what the trial is ranked by: one that has failed leaves the checkpoint before.
    """
    found = checkpoints.latest_good(folder.checkpoints)
    if found is None:
        raise UserError(
            f"{folder.checkpoints}: the best trial has no checkpoint left; train best.yaml instead (--refit)"
        )
    place, state = found[0], found[1].state
    step, value = next((each for each in best.curve if each[0] and each[1] == best.value), (best.step, math.nan))
    # After a failure other workers may have measured the same adapter again, with a loss a little apart.
    same = state.best_loss is not None and math.isclose(state.best_loss, value, rel_tol=1e-3)
    if step > state.step or (metric == "eval/loss" and not same):
        kept = "" if state.best_loss is None else f" with its best loss {state.best_loss:.4f} of step {state.best_step}"
        raise UserError(
            f"{place}: the last checkpoint of trial {best.number} is of step {state.step}{kept}, and the value that the"
            f" trial is ranked by, {value:.4f}, is of step {step}; train best.yaml instead (--refit)"
        )
    return TrainResult(state=state, stopped_early=True)


def _default(sweep_spec: SweepSpec, trials: Sequence[TrialRecord]) -> int | None:
    """The number of the trial that has the config as it is."""
    space = sweep_spec.space
    if space.has_default():
        return next((trial.number for trial in trials if trial.number == 0), None)
    if (draws := space.as_draws(sweep_spec.train_spec.config)) is None:
        return None
    wanted = space.values(draws)
    return next((trial.number for trial in trials if trial.params == wanted), None)
