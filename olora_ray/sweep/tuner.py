"""Ray Tune's part of a search: its callback and stopper, the class of a trial, and the new or resumed Tuner."""

import contextlib
import logging
import math
import os
import time
import warnings
from functools import partial
from typing import Any

from ray import tune

from olora_ray.cluster import ray_internals, resources
from olora_ray.common import logs, storage
from olora_ray.sweep import record, search_folder
from olora_ray.sweep.record import TrialRecord
from olora_ray.sweep.report import text
from olora_ray.sweep.schedulers import scheduler
from olora_ray.sweep.search_folder import Progress
from olora_ray.sweep.space import Space, Suggested
from olora_ray.sweep.spec import (
    ENDED,
    EVALUATED,
    NUMBER,
    PAIRED,
    PROGRESS,
    WHOLE,
    SweepSpec,
    number_of,
    trial_name,
    trial_path,
)
from olora_ray.sweep.trial import Ended, TrialLosses, TrialRun

logger = logging.getLogger(__name__)

# A result, a config or a state for Tune.
Result = dict[str, Any]

# The callback of the search that this process runs, or of the latest search if there were several.
_LIVE: list["SweepCallback"] = []


class SweepCallback(tune.Callback, tune.Stopper):
    """Logs one line per event, counts trials without improvement, and ends the search at its limits.

    Tune pickles it twice with the search: as callback and as stopper. Both unpickle to the callback of this process,
    which has the limits of the current space file and the current folder.
    """

    def __init__(self, folder: str, space: Space) -> None:
        self.folder = folder
        self.space = space
        self.best: tuple[float, int] | None = None
        """Value and number of the best trial that has ended."""
        self.since_better = 0
        self.over: str | None = None
        """Why the search ends before all trials have ended."""
        self.cut: set[int] = set()
        """Numbers of the trials that ran when a limit ended the search."""
        self._ended: set[str] = set()
        self._trials: list[Any] = []
        self._cleaned_at = 0.0
        self._before = search_folder.progress(folder).seconds
        self._began = time.monotonic()
        self._noted_at = self._began
        _LIVE[:] = [self]

    def __reduce__(self) -> tuple[Any, ...]:
        return _live, (self.folder, self.space)

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def complete(self) -> bool:
        return self.over is not None or len(self._ended) >= self.space.count()

    def __call__(self, trial_id: str, result: Result) -> bool:
        return False  # no single trial is stopped here: schedulers do that

    def stop_all(self) -> bool:
        budget = self.space.time_budget
        patience = self.space.patience
        if self.over is not None:
            return True
        if patience and self.since_better >= patience:
            self.over = f"{self.since_better} trials in a row had no better value"
        elif budget and self.seconds() >= budget:
            self.over = f"the time budget of {budget:g} s is used up"
        else:
            return False
        # Tune stops the other trials without calling the callback, so they are noted here.
        self.cut |= {number_of(trial) for trial in self._trials if not trial.is_finished()}
        self._note_seconds()
        logger.info(f"the search ends: {self.over}")
        return True

    def setup(
        self,
        stop: Any = None,
        num_samples: int | None = None,
        total_num_samples: int | None = None,
        **info: Any,
    ) -> None:
        # If Tune cannot read the state of an Optuna search, it silently starts a new search with one trial.
        if total_num_samples is not None and total_num_samples < self.space.count():
            raise search_folder.not_resumed(self.folder)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._trials = trials

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        # The Ray Train controller of a stopped trial dies with the trial, and does not release its CPUs and GPUs.
        if time.monotonic() - self._cleaned_at >= 1.0:
            self._cleaned_at = time.monotonic()
            resources.free_abandoned()
        if time.monotonic() - self._noted_at >= 60.0:
            self._note_seconds()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        step = (trial.last_result or {}).get("step")
        again = f"resumes after step {step}" if step else "starts"
        values = text.params(self.space.trial_values(number_of(trial), trial.config))
        logger.info(f"trial {number_of(trial)} {again}: {values or 'the unchanged config'}")
        self._note_seconds()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Result, **info: Any
    ) -> None:
        if result.get(ENDED):
            return
        shown = []
        if result.get(EVALUATED):
            shown.append(f"{self.space.metric} {result[self.space.metric]:.4f}")
        if PAIRED in result:
            shown.append(f"compared by its training loss {result[PAIRED]:.4f}")
        logger.info(
            f"trial {number_of(trial)} step {result.get('step')}/{result.get('total')} | {' | '.join(shown)}"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        how = "finished"
        if not result.get(ENDED):
            cause = self.over or self.space.scheduler.kind
            how = f"stopped at step {result.get('step', 0)} ({cause})"
            if self.over:
                self.cut.add(number_of(trial))
        self._count(trial)
        kept = self._record(trial)
        shown = ""
        if kept and kept.value is not None and kept.measured():
            gain = math.inf
            if self.best is not None:
                gain = self.best[0] - kept.value
                if self.space.better() == "max":
                    gain = -gain
            if gain > self.space.min_improvement:
                self.since_better = 0
            if gain > 0:
                self.best = (kept.value, kept.number)
            shown = f" with {self.space.metric} {kept.value:.4f}"
        logger.info(f"trial {number_of(trial)} {how}{shown}; {self._left()}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._count(trial)
        kept = self._record(trial)
        why = kept.reason if kept and kept.reason else "its process died"
        logger.info(f"trial {number_of(trial)} failed: {why}; {self._left()}")

    def get_state(self) -> Result:
        return {"best": self.best, "since_better": self.since_better, "ended": sorted(self._ended)}

    def set_state(self, state: Result) -> None:
        self.best = state.get("best")
        self.since_better = state.get("since_better", 0)
        self._ended = set(state.get("ended", ()))

    def _record(self, trial: Any) -> TrialRecord | None:
        # The trial's own record, not Tune's result: it is what the leaderboard shows.
        try:
            return record.read_record(trial_path(self.folder, number_of(trial), self.space))
        except OSError:
            # Raising would make Tune count the trial as failed. Only its log line lacks the value.
            return None

    def _count(self, trial: Any) -> None:
        self._ended.add(trial.trial_id)
        self.since_better += 1
        self._note_seconds()

    def _note_seconds(self) -> None:
        self._noted_at = time.monotonic()
        # The next note repeats it. The search does not need the file.
        with contextlib.suppress(OSError):
            search_folder.keep(self.folder, Progress(self.seconds()))

    def _left(self) -> str:
        ended = f"{len(self._ended)} of {self.space.count()} trials have ended"
        if self.best is None:
            return ended
        value, number = self.best
        return f"{ended}, the best is trial {number} with {value:.4f}"


def _live(folder: str, space: Space) -> SweepCallback:
    """Return the callback of this process in place of a pickled one; `folder` is the search's folder at pickling."""
    if _LIVE:
        return _LIVE[0]
    return SweepCallback(folder, space)


class TrialFailed(Exception):
    """The trial ended without a result; the search continues."""


class SearchTrial(tune.Trainable):
    """The class of a trial for Tune. Each `step` waits for the next evaluation of a training in a thread."""

    def setup(self, config: Result, sweep_spec: SweepSpec) -> None:  # type: ignore[override]  # see with_parameters
        ray_internals.quiet_ray()
        # A warning per trial would drown the lines of the search.
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        # The lines of a trial go to its own log.txt. The driver logs what is the same for all trials.
        logging.getLogger(logs.PACKAGE).addHandler(logging.NullHandler())
        logging.getLogger(logs.PACKAGE).propagate = False
        self.sweep_spec = sweep_spec
        self._begin(config)

    def reset_config(self, new_config: Result) -> bool:
        # Reusing the process saves the trial the time of its imports.
        self.trial_run.end()
        self._begin(new_config)
        return True

    def _begin(self, config: Result) -> None:
        self.trial_run = TrialRun(self.sweep_spec, config[NUMBER], config)
        self.last: Result = {}

    def step(self) -> Result:
        """Return the next evaluation as Tune's result; raise TrialFailed if the training failed."""
        item = self.trial_run.next()
        if isinstance(item, Ended):
            if item.status == "failed":
                raise TrialFailed(item.reason)
            return {**self.last, "done": True, ENDED: True}
        self.last = self._result(item)
        if item.step >= self.trial_run.total:
            ended = isinstance(self.trial_run.next(), Ended)
            return {**self.last, "done": ended, ENDED: ended}
        return dict(self.last)

    def _result(self, item: TrialLosses) -> Result:
        space = self.trial_run.sweep_spec.space
        total = self.trial_run.total
        # Schedulers ignore NaN, or take it for the best value. Infinity is the worst value for them.
        worst = math.inf if space.better() == "min" else -math.inf
        value = item.value
        if value is None:  # Tune and Optuna need one for each result
            compared = worst if item.paired is None else item.paired
            if space.metric == "eval/perplexity":
                compared = math.exp(compared)
            value = self.last.get(space.metric, compared)
        if math.isnan(value):
            value = worst
        result: Result = {
            **item.row,  # all metrics of the step, for Tune's tables
            "step": item.step,
            "total": total,
            PROGRESS: WHOLE * item.step / total,
            space.metric: value,
            EVALUATED: item.value is not None,
        }
        if item.paired is not None:
            result[PAIRED] = item.paired
        return result

    def cleanup(self) -> None:
        self.trial_run.end()


# Tune reserves this memory for a trial's own process. Its workers take the CPUs and GPUs.
NOTE_BYTES = 64 * 2**20
# Memory that this process may really need, with the channel and Ray Train's controller on the same node.
HELD_BYTES = 400 * 2**20


def build(sweep_spec: SweepSpec, callback: SweepCallback, max_concurrent_trials: int) -> tune.Tuner:
    """Return the Tuner of a search; an interrupted search is resumed.

    Raises UserError if the state of a search is lost whose values cannot be drawn again, or if its state names code
    that no longer exists.
    """
    # Otherwise Tune ends an interrupted search as if it were complete.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    ray_internals.keep_credentials()
    # `callback` logs each failure in one line.
    for name in ("execution.tune_controller", "tune", "analysis.experiment_analysis"):
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.CRITICAL)
    # These warn of slow callbacks, and of log files that do not exist yet.
    for name in ("utils.util", "logger.logger"):
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.ERROR)
    # Optuna warns of values that are lists. They are a problem only for studies in Optuna's own storage.
    warnings.filterwarnings(
        "ignore", message="Choices for a categorical distribution", category=UserWarning
    )
    # The trials' own processes run on the driver's node if its memory is enough. A trial cannot survive its process. On
    # another node the process could be lost while the trial's workers live; without the driver's node the search ends
    # anyway.
    own = {"memory": NOTE_BYTES, **resources.own_node(max_concurrent_trials, HELD_BYTES)}
    trainable: Any = tune.with_resources(
        tune.with_parameters(SearchTrial, sweep_spec=sweep_spec), own
    )
    space = sweep_spec.space
    folder = sweep_spec.folder
    params: Result | None = None
    if space.searcher != "tpe":  # Optuna draws itself
        params = {NUMBER: tune.grid_search(list(range(space.count())))}
        for name in space.draw_names():
            params[name] = tune.sample_from(partial(_draw, space, name))
    if search_folder.lost(folder):
        _forget(sweep_spec)
    path = search_folder.tune_place(folder)
    if tune.Tuner.can_restore(path):
        try:
            tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True, param_space=params)
        except (ImportError, AttributeError):
            # Tune's pickles name a class or function that no longer exists.
            raise search_folder.not_resumed(folder) from None
        ray_internals.update_restored(tuner, folder, max_concurrent_trials, scheduler(sweep_spec))
        return tuner
    settings = tune.TuneConfig(
        metric=space.metric,
        mode=space.better(),
        search_alg=_searcher(sweep_spec),
        scheduler=scheduler(sweep_spec),
        num_samples=space.count() if space.searcher == "tpe" else 1,
        max_concurrent_trials=max_concurrent_trials,
        # Processes are reused only if trials end by themselves. A trial that a scheduler has stopped would train on
        # while its process waits for the next trial.
        reuse_actors=space.scheduler.kind == "none",
        trial_name_creator=_name,
        trial_dirname_creator=_name,
    )
    run = tune.RunConfig(
        name=search_folder.TUNE,
        storage_path=folder,
        failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
        # A trial resumes from the checkpoints in its own folder, so Tune keeps none.
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        stop=callback,
        callbacks=[callback],
        verbose=0,
    )
    return tune.Tuner(trainable, param_space=params, tune_config=settings, run_config=run)


def _forget(sweep_spec: SweepSpec) -> None:
    """Remove Tune's lost state. The search starts again, and its trials resume from their own folders."""
    folder = sweep_spec.folder
    # If values follow from the results of others, a trial would now get other values than those in its folder. Only a
    # search without any result can start again then.
    if sweep_spec.space.searcher == "tpe":
        if any(each.measured() for each in record.read_all(folder).values()):
            raise search_folder.not_resumed(folder)
        storage.remove(storage.join(folder, "trials"))
    storage.remove(search_folder.tune_place(folder))
    logger.warning(
        "search: Ray Tune's state is lost; the search starts again, its trials resume from checkpoints"
    )


def _draw(space: Space, name: str, config: Result) -> Any:
    return space.drawn(config[NUMBER]).get(name)


def _searcher(sweep_spec: SweepSpec) -> Any:
    space = sweep_spec.space
    if space.searcher != "tpe":
        return None
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    default = None
    if space.include_default:
        default = space.as_draws(sweep_spec.train_spec.config)
    return OptunaSearch(
        partial(_suggested, space),
        metric=space.metric,
        mode=space.better(),
        points_to_evaluate=[default] if default else None,
        sampler=optuna.samplers.TPESampler(seed=space.seed),
    )


def _suggested(space: Space, trial: Any) -> Result:
    space.draw(Suggested(trial))
    return {NUMBER: trial.number}


def _name(trial: Any) -> str:
    return trial_name(trial.config[NUMBER])
