"""Builds Ray Tune's Tuner from the specification of a search, or restores that of an interrupted one."""

import json
import logging
import math
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from olora_ray.cluster import ray_internals, resources
from olora_ray.common import logs, storage
from olora_ray.sweep import record as trial_file
from olora_ray.sweep import state
from olora_ray.sweep.callback import SweepCallback
from olora_ray.sweep.schedulers import scheduler
from olora_ray.sweep.space import Space, Suggested
from olora_ray.sweep.spec import ENDED, NUMBER, PROGRESS, WHOLE, SweepSpec, number_of, trial_name
from olora_ray.sweep.trial import Ended, Measured, TrialRun

logger = logging.getLogger(__name__)

# Ray Tune's class of a trial, which runs a TrialRun.


POINTER = "checkpoint.json"


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
        Path(checkpoint_dir, POINTER).write_text(json.dumps(note), encoding="utf-8")

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]  # Tune gives the folder
        """Continue from a checkpoint of this trial, or take over that of a better one."""
        note = json.loads(Path(checkpoint, POINTER).read_text(encoding="utf-8"))
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
    trainable: Any = tune.with_resources(
        tune.with_parameters(SearchTrial, sweep_spec=sweep_spec), _own_resources(max_concurrent_trials)
    )
    if state.lost(sweep_spec.folder):
        _forget(sweep_spec)
    place = state.place(sweep_spec.folder)
    if tune.Tuner.can_restore(place):
        try:
            found = tune.Tuner.restore(place, trainable, resume_unfinished=True, param_space=_params(sweep_spec.space))
        except (ImportError, AttributeError):  # a class or function that Tune's pickles name is not there any more
            raise state.not_resumed(sweep_spec.folder) from None
        ray_internals.go_on_with(found, sweep_spec.folder, max_concurrent_trials, scheduler(sweep_spec))
        return found
    state.begin(sweep_spec.folder)
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
        name=state.TUNE,
        storage_path=sweep_spec.folder,
        failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
        stop=callback,
        callbacks=[callback],
        verbose=0,
    )
    return tune.Tuner(trainable, param_space=_params(space), tune_config=settings, run_config=run)


def _own_resources(trials: int) -> dict[str, float]:
    """What the own process of a trial takes, of so many at the same time.

    It lies on the driver's node, without which the search ends anyway, where that has memory for all: a trial ends for
    good with its process, and any other node may be lost while its workers are elsewhere.
    """
    return {"memory": NOTE_BYTES, **resources.own_node(trials, HELD_BYTES)}


def _forget(sweep_spec: SweepSpec) -> None:
    """Remove Tune's state, which is lost: the search begins anew, and its trials find what they have done.

    Where values follow from what others have measured, a trial could find that of another one: only a search that has
    measured nothing begins anew then. Raises UserError for the others.
    """
    folder = sweep_spec.folder
    if not sweep_spec.space.follows_from_numbers():
        if any(record.measured() for record in trial_file.read_all(folder).values()):
            raise state.not_resumed(folder)
        storage.remove(storage.join(folder, "trials"))
    storage.remove(state.place(folder))
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
