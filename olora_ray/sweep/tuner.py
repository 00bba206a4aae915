"""Ray Tune's part of a search: its callback and stopper, its class of a trial, and the Tuner, also a restored one."""

import contextlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from olora_ray.cluster import ray_internals, resources
from olora_ray.common import logs, storage
from olora_ray.sweep import record, search_folder
from olora_ray.sweep.record import TrialRecord
from olora_ray.sweep.schedulers import scheduler
from olora_ray.sweep.search_folder import Progress
from olora_ray.sweep.space import Space, Suggested
from olora_ray.sweep.spec import ENDED, NUMBER, PROGRESS, WHOLE, SweepSpec, number_of, trial_name, trial_place
from olora_ray.sweep.trial import Ended, Measured, TrialRun

logger = logging.getLogger(__name__)

_LIVE: list["SweepCallback"] = []
"""The callback of the search that this process runs: of several, one after the other, that of the last."""


class SweepCallback(tune.Callback, tune.Stopper):
    """Logs one line per event, counts trials that bring nothing better, and ends the search at its limits.

    Tune pickles it with the search, once as callback and once as stopper. Both unpickle as the callback that the
    process already has: there is one, with the limits of today's space file, and the place of today.
    """

    def __init__(self, folder: str, space: Space) -> None:
        self.folder, self.space = folder, space
        self.best: tuple[float, int] | None = None
        """The best value of a trial that has ended, and that trial."""
        self.since_better = 0
        self.over: str | None = None
        """The reason for which the search ends before all trials have ended by themselves."""
        self.cut: set[int] = set()
        """Trials that were under way when a limit ended the search."""
        self._ended: set[str] = set()
        self._trials: list[Any] = []
        self._cleaned_at = 0.0
        self._before, self._began = search_folder.progress(folder).seconds, time.monotonic()
        self._noted_at = self._began
        _LIVE[:] = [self]

    def __reduce__(self) -> tuple[Any, ...]:
        return _live, (self.folder, self.space)

    def seconds(self) -> float:
        """Seconds of the search so far, over all attempts."""
        return self._before + time.monotonic() - self._began

    def complete(self) -> bool:
        """Whether the search is over: at a limit, or because all trials have ended."""
        return self.over is not None or len(self._ended) >= self.space.count()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tune asks after each result whether this trial is to stop."""
        return False

    def stop_all(self) -> bool:
        """Tune asks now and then whether the search is to end."""
        if not self.over and (reason := self._limit()):
            self.over = reason
            # Tune stops all that have not ended, and tells no callback.
            self.cut |= {_number(trial) for trial in self._trials if not trial.is_finished()}
            self._note_seconds()
            logger.info(f"the search ends: {self.over}")
        return self.over is not None

    def setup(
        self, stop: Any = None, num_samples: int | None = None, total_num_samples: int | None = None, **info: Any
    ) -> None:
        """Called before the first trial; raises UserError for a search that could not be resumed.

        Tune begins that anew, with as many trials as a search has that says nothing: one of Optuna's.
        """
        if total_num_samples is not None and total_num_samples < self.space.count():
            raise search_folder.not_resumed(self.folder)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called all the time while trials run, before `stop_all`."""
        self._trials = trials

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called all the time while trials run."""
        # The controllers of stopped trials die with them, and do not give their room back.
        if time.monotonic() - self._cleaned_at >= 1.0:
            self._cleaned_at = time.monotonic()
            resources.free_abandoned()
        if time.monotonic() - self._noted_at >= 60.0:
            self._note_seconds()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, or continues from a checkpoint."""
        step = (trial.last_result or {}).get("step")
        again = f"continues after step {step}" if step else "starts"
        logger.info(f"trial {_number(trial)} {again}: {described(self._values(trial)) or 'the config as it is'}")
        self._note_seconds()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluation."""
        value, step = result.get(self.space.metric), result.get("step")
        if value is None or result.get(ENDED):
            return
        logger.info(f"trial {_number(trial)} step {step}/{result.get('total')} | {self.space.metric} {value:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has finished, or was stopped."""
        result = trial.last_result or {}
        found = self._record(trial)
        step = f"step {result.get('step', 0)}"
        how = "finished" if result.get(ENDED) else f"stopped at {step} ({self.over or self.space.scheduler.kind})"
        if self.over and not result.get(ENDED):
            self.cut.add(_number(trial))
        self._count(trial)
        shown = ""
        if found and found.value is not None and found.measured():
            self._note(found.value, found.number)
            shown = f" with {self.space.metric} {found.value:.4f}"
        logger.info(f"trial {_number(trial)} {how}{shown}; {self._left()}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed."""
        self._count(trial)
        found = self._record(trial)
        why = found.reason if found and found.reason else "its process died"
        logger.info(f"trial {_number(trial)} failed: {why}; {self._left()}")

    def get_state(self) -> dict[str, Any]:
        """State that Tune saves with the search."""
        return {"best": self.best, "since_better": self.since_better, "ended": sorted(self._ended)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore `get_state` after an interruption."""
        best = state.get("best")
        self.best = None if best is None else (float(best[0]), int(best[1]))
        self.since_better, self._ended = int(state.get("since_better", 0)), set(state.get("ended", ()))

    def _values(self, trial: Any) -> dict[str, Any]:
        draws = {name: value for name, value in trial.config.items() if name != NUMBER}
        return {} if self.space.has_default() and _number(trial) == 0 else self.space.values(draws)

    def _limit(self) -> str | None:
        patience, budget = self.space.patience, self.space.time_budget
        if patience and self.since_better >= patience:
            return f"{self.since_better} trials in a row have brought nothing better"
        if budget and self.seconds() >= budget:
            return f"the time budget of {budget:g} s is used up"
        return None

    def _record(self, trial: Any) -> TrialRecord | None:
        """What the trial itself has written down, which is what the leaderboard will show."""
        try:
            return record.read(trial_place(self.folder, _number(trial)))
        except OSError:  # Tune would count the trial as failed; its line lacks the value
            return None

    def _count(self, trial: Any) -> None:
        self._ended.add(trial.trial_id)
        self.since_better += 1
        self._note_seconds()

    def _note(self, value: float, number: int) -> None:
        """`value` is the best of a trial, and finite."""
        sign = 1 if self.space.better() == "min" else -1
        gain = float("inf") if self.best is None else sign * (self.best[0] - value)
        if gain > self.space.min_improvement:
            self.since_better = 0
        if gain > 0:
            self.best = (value, number)

    def _note_seconds(self) -> None:
        self._noted_at = time.monotonic()
        with contextlib.suppress(OSError):  # the next note has it; the search does not depend on it
            search_folder.keep(self.folder, Progress(self.seconds()))

    def _left(self) -> str:
        best = f", the best of them trial {self.best[1]} with {self.best[0]:.4f}" if self.best else ""
        return f"{len(self._ended)} of {self.space.count()} trials have ended{best}"


def _live(folder: str, space: Space) -> SweepCallback:
    """What a pickled callback becomes; `folder` is where the search was then."""
    return _LIVE[0] if _LIVE else SweepCallback(folder, space)


def described(values: Mapping[str, Any]) -> str:
    """Values as a person reads them: `adapter.rank=16, train.lr=3.2e-04`."""
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def _number(trial: Any) -> int:
    return number_of(str(trial))


class TrialFailed(Exception):
    """A trial has ended without a result; the search continues."""


class SearchTrial(tune.Trainable):
    """Starts the training when Tune asks for its first evaluation, and ends it when Tune stops the trial."""

    def setup(self, config: dict[str, Any], sweep_spec: SweepSpec) -> None:  # type: ignore[override]  # see with_parameters
        """`config` has the trial's number, and its draws."""
        ray_internals.quiet_ray()
        logging.getLogger("mlflow").setLevel(logging.ERROR)  # a warning per trial would hide the search
        # The trial's lines are in its own log.txt; what is the same for all trials, the driver says.
        logging.getLogger(logs.PACKAGE).addHandler(logging.NullHandler())
        logging.getLogger(logs.PACKAGE).propagate = False
        self.sweep_spec = sweep_spec
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, where the one of before has ended: what it has imported need not be imported again."""
        self.trial_run.end()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        draws = {name: value for name, value in config.items() if name != NUMBER}
        # PBT copies the other trial's config, number included; only trial_name still identifies this one.
        self.trial_run = TrialRun(self.sweep_spec, number_of(self.trial_name), draws)
        self.last: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation; raises TrialFailed if there will be none."""
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

    def _result(self, item: Measured) -> dict[str, Any]:
        space, total = self.trial_run.sweep_spec.space, self.trial_run.total
        # Of NaN schedulers make nothing, or the best: infinity is the worst value there is.
        worst = math.inf if space.better() == "min" else -math.inf
        value = worst if math.isnan(item.value) else item.value
        return {"step": item.step, "total": total, PROGRESS: WHOLE * item.step / total, space.metric: value}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where the checkpoint of the last evaluation lies; Tune keeps this note, not the tensors."""
        note = {"checkpoints": self.trial_run.folder.checkpoints, "step": self.last.get("step", 0)}
        Path(checkpoint_dir, "checkpoint.json").write_text(json.dumps(note), encoding="utf-8")

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]  # Tune gives the folder
        """Continue from a checkpoint of this trial, or take over that of a better one."""
        note = json.loads(Path(checkpoint, "checkpoint.json").read_text(encoding="utf-8"))
        # By the trial's number: the search may lie elsewhere than when this was written.
        owner = number_of(note["checkpoints"].rpartition("/")[0])
        self.trial_run.resume_from(owner, int(note["step"]))
        # A training that had stopped early measures nothing more, and a result without the metric ends Tune's search.
        if (measured := self.trial_run.last()) is not None:
            self.last = self._result(measured)

    def cleanup(self) -> None:
        """End the workers and wait for them."""
        self.trial_run.end()


NOTE_BYTES = 64 * 2**20
"""Memory that Tune counts for a trial's own process; its workers take the CPUs and GPUs."""
HELD_BYTES = 400 * 2**20
"""Memory that this process may take in fact, with the channel and Train's controller, which lie beside it."""


def build(sweep_spec: SweepSpec, callback: SweepCallback, max_concurrent_trials: int) -> tune.Tuner:
    """The Tuner of a search, with so many trials at the same time; one that was interrupted resumes.

    Raises UserError for one whose state is lost, and with it values that it would not draw again, and for one whose
    state names code that is not there any more.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune would end the search as if it were complete
    ray_internals.keep_credentials()
    # Each failure is logged by `callback` in one line.
    for name in ("execution.tune_controller", "tune", "analysis.experiment_analysis"):
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.CRITICAL)
    # How long its own callbacks take, and files of loggers that are not there yet.
    for name in ("utils.util", "logger.logger"):
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Consider boosting PBT performance", category=UserWarning)
    # Of values that are lists; they matter to studies that Optuna itself stores.
    warnings.filterwarnings("ignore", message="Choices for a categorical distribution", category=UserWarning)
    # The own process of a trial lies on the driver's node, without which the search ends anyway, where that has memory
    # for all: a trial ends for good with its process, and another node may be lost while its workers are elsewhere.
    own = {"memory": NOTE_BYTES, **resources.own_node(max_concurrent_trials, HELD_BYTES)}
    trainable: Any = tune.with_resources(tune.with_parameters(SearchTrial, sweep_spec=sweep_spec), own)
    if search_folder.lost(sweep_spec.folder):
        _forget(sweep_spec)
    place = search_folder.tune_place(sweep_spec.folder)
    if tune.Tuner.can_restore(place):
        try:
            found = tune.Tuner.restore(place, trainable, resume_unfinished=True, param_space=_params(sweep_spec.space))
        except (ImportError, AttributeError):  # a class or function that Tune's pickles name is not there any more
            raise search_folder.not_resumed(sweep_spec.folder) from None
        ray_internals.go_on_with(found, sweep_spec.folder, max_concurrent_trials, scheduler(sweep_spec))
        return found
    space = sweep_spec.space
    settings = tune.TuneConfig(
        metric=space.metric,
        mode=space.better(),
        search_alg=_searcher(sweep_spec),
        scheduler=scheduler(sweep_spec),
        num_samples=space.count() if space.searcher == "tpe" else 1,
        max_concurrent_trials=max_concurrent_trials,
        # Where trials end by themselves, the next one takes over the process. One that a scheduler has stopped would
        # train on in a process that waits for another.
        reuse_actors=space.scheduler.kind == "none",
        trial_name_creator=_name,
        trial_dirname_creator=_name,
    )
    run = tune.RunConfig(
        name=search_folder.TUNE,
        storage_path=sweep_spec.folder,
        failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
        stop=callback,
        callbacks=[callback],
        verbose=0,
    )
    return tune.Tuner(trainable, param_space=_params(space), tune_config=settings, run_config=run)


def _forget(sweep_spec: SweepSpec) -> None:
    """Remove Tune's state, which is lost: the search begins anew, and its trials find what they have done.

    Where values follow from what others have measured, a trial could find that of another one: only a search that has
    measured nothing begins anew then. Raises UserError for the others.
    """
    folder = sweep_spec.folder
    if not sweep_spec.space.follows_from_numbers():
        if any(each.measured() for each in record.read_all(folder).values()):
            raise search_folder.not_resumed(folder)
        storage.remove(storage.join(folder, "trials"))
    storage.remove(search_folder.tune_place(folder))
    logger.warning("search: Ray Tune's state of it is lost; it begins anew, with what its trials have done so far")


def _params(space: Space) -> dict[str, Any] | None:
    """Tune's grid over the numbers of the trials, each with its draws; None where Optuna draws."""
    if space.searcher == "tpe":
        return None
    numbers = {NUMBER: tune.grid_search(list(range(space.count())))}
    return {**numbers, **{name: tune.sample_from(partial(_draw, space, name)) for name in space.draw_names()}}


def _draw(space: Space, name: str, config: dict[str, Any]) -> Any:
    return space.drawn(config[NUMBER]).get(name)


def _searcher(sweep_spec: SweepSpec) -> Any:
    if sweep_spec.space.searcher != "tpe":
        return None
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    default = sweep_spec.space.as_draws(sweep_spec.train_spec.config) if sweep_spec.space.include_default else None
    return OptunaSearch(
        partial(_suggested, sweep_spec.space),
        metric=sweep_spec.space.metric,
        mode=sweep_spec.space.better(),
        points_to_evaluate=[default] if default else None,
        sampler=optuna.samplers.TPESampler(seed=sweep_spec.space.seed),
    )


def _suggested(space: Space, trial: Any) -> dict[str, Any]:
    space.draw(Suggested(trial))
    return {NUMBER: trial.number}


def _name(trial: Any) -> str:
    return trial_name(trial.config[NUMBER])
