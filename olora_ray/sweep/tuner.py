"""Builds Ray Tune's Tuner from the specification of a search, or restores that of an interrupted one."""

import logging
import os
import warnings
from functools import partial
from typing import Any

from ray import tune

from olora_ray.sweep import space as spaces
from olora_ray.sweep import state
from olora_ray.sweep.callback import SweepCallback
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import NUMBER, SweepSpec, trial_name
from olora_ray.sweep.tune_trial import SearchTrial

NOTE_BYTES = 64 * 2**20
"""Memory that Tune counts for a trial's own process; its workers take the CPUs and GPUs."""


def build(sweep_spec: SweepSpec, callback: SweepCallback, max_concurrent_trials: int) -> tune.Tuner:
    """The Tuner of a search, with so many trials at the same time; one that was interrupted resumes."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune would end the search as if it were complete
    # Each failure is logged by `callback` in one line.
    for name in ("execution.tune_controller", "tune", "analysis.experiment_analysis"):
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.CRITICAL)
    # How long its own callbacks take, and files of loggers that are not there yet.
    for name in ("utils.util", "logger.logger"):
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Consider boosting PBT performance", category=UserWarning)
    trainable: Any = tune.with_resources(
        tune.with_parameters(SearchTrial, sweep_spec=sweep_spec), {"memory": NOTE_BYTES}
    )
    place = state.place(sweep_spec.folder)
    if tune.Tuner.can_restore(place):
        return tune.Tuner.restore(place, trainable, resume_unfinished=True, param_space=_params(sweep_spec.space))
    state.begin(sweep_spec.folder)
    space = sweep_spec.space
    settings = tune.TuneConfig(
        metric=space.metric,
        mode=space.better(),
        search_alg=_searcher(sweep_spec),
        scheduler=_scheduler(sweep_spec),
        num_samples=space.count() if space.searcher == "tpe" else 1,
        max_concurrent_trials=max_concurrent_trials,
        time_budget_s=space.time_budget,
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


def _params(space: Space) -> dict[str, Any] | None:
    """Tune's grid over the numbers of the trials, each with its draws; None where Optuna draws."""
    if space.searcher == "tpe":
        return None
    drawn = [space.drawn(number) for number in range(space.count())]
    names = max(drawn, key=len)
    numbers = {NUMBER: tune.grid_search(list(range(len(drawn))))}
    return {**numbers, **{name: tune.sample_from(partial(_draw, drawn, name)) for name in names}}


def _draw(drawn: list[dict[str, Any]], name: str, config: dict[str, Any]) -> Any:
    return drawn[config[NUMBER]].get(name)


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
    spaces.suggest(space, trial)
    return {NUMBER: trial.number}


def _scheduler(sweep_spec: SweepSpec) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, PopulationBasedTraining

    space, settings = sweep_spec.space, sweep_spec.space.scheduler
    grace = settings.grace or sweep_spec.train_spec.config.train.eval_every
    if settings.kind == "asha":
        # One more than the last step: ASHA then counts a trial that does all its steps as finished, not stopped.
        most = max(sweep_spec.total() + 1, grace + 1)
        return ASHAScheduler("step", max_t=most, grace_period=grace, reduction_factor=settings.reduction)
    if settings.kind == "median":
        return MedianStoppingRule("step", grace_period=grace, min_samples_required=3)
    if settings.kind == "population":
        return PopulationBasedTraining(
            "step",
            perturbation_interval=settings.interval or sweep_spec.train_spec.config.train.eval_every,
            hyperparam_mutations={name: partial(_redrawn, space, name) for name in space.search},
            custom_explore_fn=partial(_inside, space),
            synch=True,  # otherwise a trial could exploit a checkpoint its owner has just deleted
            log_config=False,
        )
    return FIFOScheduler()


def _redrawn(space: Space, name: str) -> Any:
    import random

    return space.drawn(random.randrange(2**30))[name]


def _inside(space: Space, config: dict[str, Any]) -> dict[str, Any]:
    """Values that PBT has multiplied by 0.8 or 1.2, brought back into the range that the space gives."""
    for name, domain in space.search.items():
        if not domain.options():
            low, high = domain.extremes()
            config[name] = min(max(config[name], low), high)
    return config


def _name(trial: Any) -> str:
    return trial_name(trial.config[NUMBER])
