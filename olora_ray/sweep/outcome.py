"""The outcome of a search: its record, its report, and the best trial as a registered model."""

import logging
import math
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

# A space sets these to keep its trials short; a refit has the length of the config itself.
LENGTH = ("train.steps", "train.epochs", "train.eval_every", "train.checkpoint_every")
# The space decides how its trials are measured. best.yaml keeps the config's own way, because the config's gate may ask
# for a score that the trials do without.
MEASURE = "evaluation."


def record(sweep_spec: SweepSpec) -> SearchRecord:
    space = sweep_spec.space
    progress = search_folder.progress(sweep_spec.folder)
    records = sorted(read_all(sweep_spec.folder).items())
    trials = tuple(_with_reason(trial, progress, space.scheduler.kind) for _, trial in records)
    unchanged = [trial.number for trial in trials if trial.number == 0]
    if not space.has_default():
        draws = space.as_draws(sweep_spec.train_spec.config)
        values = draws and space.values(draws)
        unchanged = [trial.number for trial in trials if trial.params == values]
    return SearchRecord(
        name=sweep_spec.name,
        metric=space.metric,
        mode=space.better(),
        searcher=space.searcher,
        scheduler=space.scheduler.kind,
        seconds=progress.seconds,
        trials=trials,
        fields=tuple(space.search),
        default=next(iter(unchanged), None),
        notes=(progress.note,) if progress.note else (),
    )


def _with_reason(trial: TrialRecord, progress: Progress, scheduler: str) -> TrialRecord:
    # A stopped trial does not know who stopped it, and a killed process writes no reason: the reason is added here.
    if trial.status == "stopped" and trial.total and trial.step >= trial.total:
        return replace(trial, status="finished")  # it ended before the stop reached it
    if trial.status in ("stopped", "unfinished") and trial.number in progress.cut:
        return replace(trial, status="unfinished", reason="the search ended before the trial did")
    if trial.status != "stopped":
        return trial
    reason = scheduler
    if trial.total:
        reason += f" after {trial.step / trial.total:.0%} of its {plural(trial.total, 'step')}"
    return replace(trial, reason=reason)


def conclude(config: Config, sweep_spec: SweepSpec, search: SearchRecord, tracker: Tracker) -> None:
    """Write report, leaderboard and best.yaml, log them to MLflow, and log the outcome."""
    best = search.best()
    assert best is not None
    path = storage.join(sweep_spec.folder, "best.yaml")
    storage.write_text(path, dump(best_config(config, sweep_spec, best)))
    for file in [*page.write_report(search, sweep_spec.folder), path]:
        with node_cache.fetched(file) as local:
            tracker.artifact(local)
    tracker.table("leaderboard", *text.table(search))
    tracker.metrics({0: {f"best/{search.metric}": best.value or 0.0}})
    for line in [*text.lines(search), *text.summary(search)]:
        logger.info(line)
    logger.info(f"report: {storage.join(sweep_spec.folder, 'report.html')}")
    logger.info(f"best config: {path}")


def best_config(
    config: Config, sweep_spec: SweepSpec, best: TrialRecord, refit: bool = False
) -> Config:
    """Return the user's config with the values of the best trial, and with what the space sets for all trials.

    The space's `evaluation.*` is left out, and for a `refit` also its settings of the length.
    """
    left = (MEASURE, *LENGTH) if refit else MEASURE
    common = {
        field: value for field, value in sweep_spec.space.set.items() if not field.startswith(left)
    }
    name = f"{sweep_spec.name}-{'refit' if refit else 'best'}"
    return override(config, {**common, **best.params, "run.name": name})


def register(sweep_spec: SweepSpec, search: SearchRecord) -> int:
    """Export, check and register the best trial's model as it is; return the version.

    Raises UserError if the exports disagree, or if the trial's best adapter is lost.
    """
    best = search.best()
    assert best is not None
    trial = override(
        sweep_spec.train_spec.config,
        {**best.params, "run.name": f"{sweep_spec.name}-{trial_name(best.number)}"},
    )
    spec = trial_spec(sweep_spec, trial)
    folder = RunFolder(best.folder)
    result = fit.finished_training(spec, folder, folder.state()) or _stopped(
        folder, best, search.metric
    )
    tags = {"olora.search": sweep_spec.name, "olora.trial": str(best.number)}
    version = run.register(spec, folder, result, tags, sweep_spec.parent)
    assert version is not None
    name = trial.registry.model
    logger.info(
        f"registered: {name} version {version} (models:/{name}@{trial.registry.alias}), trial {best.number}"
    )
    return version


def _stopped(folder: RunFolder, best: TrialRecord, metric: str) -> TrainResult:
    """Return the result of a trial that ended early, from its last checkpoint.

    Raises UserError if that checkpoint does not hold the adapter by which the trial is ranked.
    """
    latest = checkpoints.latest_good(folder.checkpoints)
    if latest is None:
        raise UserError(
            f"{folder.checkpoints}: the best trial has no checkpoint left; pass --refit to train best.yaml instead"
        )
    path, checkpoint = latest
    state = checkpoint.state
    value = best.value
    assert value is not None
    steps = (step for step, measured in best.curve if step and measured == value)
    step = next(steps, best.step)
    # A failed trial keeps the checkpoint before its failure. After a restart, other workers may have measured the same
    # adapter again, and their loss differs a little.
    saved = state.best_loss
    for row in state.history:
        if row["step"] == state.best_step and metric in row:
            saved = row[metric]
    same = saved is not None and math.isclose(saved, value, rel_tol=1e-3)
    if step > state.step or (metric.startswith("eval/") and not same):
        kept = ""
        if saved is not None:
            kept = f" with the adapter of step {state.best_step}, whose value is {saved:.4f}"
        raise UserError(
            f"{path}: trial {best.number} has its best value {value:.4f} at step {step}, but its last checkpoint"
            f" is of step {state.step}{kept}; pass --refit to train best.yaml instead"
        )
    return TrainResult(state=state, stopped_early=True)
