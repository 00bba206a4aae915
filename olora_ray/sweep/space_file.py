"""Space files: reading one, checking it against the config that it varies, and the plan of a search."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from olora_ray.cluster.decide import DataDecisions, decide, objective_decision
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.common.errors import UserError, of_problems
from olora_ray.config.load import at, flatten, override, read_yaml, validated
from olora_ray.config.schema import NO_GATE, Config
from olora_ray.config.section import is_auto
from olora_ray.pipeline import prepare
from olora_ray.pipeline.base import Base, open_base
from olora_ray.sweep import shared_work
from olora_ray.sweep.space import SAME_BASE, Draws, Space, Values
from olora_ray.train.objectives.objective import Objective, objective_named

# A space cannot change these sections: they decide where a run is and what it is called, not its result.
FIXED = ("run.", "tracking.", "registry.", "cluster.", "gate.", "retrain.", "notify.")
# A space can set these but not search them: all trials are measured in the same way, on the same rows.
MEASURE = ("data.eval", "data.max_rejected", "evaluation.", "train.objective")
# A space can set these but not search them: they do not change the result of a training.
IDLE = ("train.activation_checkpointing", "train.keep", "train.log_every")


# Trials with other values of these fields cannot be compared by these metrics.
SCALES = {
    "train.beta": ("eval/objective", "eval/pairs/loss"),
    "train.chosen": ("eval/objective",),
}
# A search decides these once, so a trial cannot draw auto.
DECIDED = ("data.max_length", "data.packing", "train.micro_batch")


def load_space(path: str | Path, config: Config) -> Space:
    """Read a space file and check it against a config.

    Raises UserError that names the field for unknown fields, empty ranges, values that the config refuses, and a metric
    that no trial would report.
    """
    tree = read_yaml(path, "space file")
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: expected fields (search:, metric:, ...), but it holds a {type(tree).__name__}"
        )
    space = validated(Space, tree, str(path))
    if "metric" not in space.model_fields_set:
        space = space.model_copy(update={"metric": _objective(space, config).measures()[0]})
    check_space(space, config, str(path))
    return space


def check_space(space: Space, config: Config, where: str = "space") -> None:
    """Raise UserError unless the config accepts the trials of the space, and they report its metric."""
    for problem in _problems(space, config, where):
        raise UserError(f"{where}: {problem}")


def _problems(space: Space, config: Config, where: str) -> Iterator[str]:
    for part, fields in (("search", space.search), ("set", space.set)):
        for field in fields:
            if f"{field}.".startswith(FIXED):
                yield f"{part}.{field}: set it in the config; a search cannot vary this section"
            if field in Config.model_fields:
                yield (
                    f"{part}.{field}: a section would reset its other fields to their defaults; name single"
                    f" fields, {field}.NAME"
                )
    for field, domain in space.search.items():
        if field.startswith(MEASURE) or any(name.startswith(f"{field}.") for name in MEASURE):
            yield f"search.{field}: all trials must be measured in the same way; put it under set"
        if field in IDLE:
            yield f"search.{field}: it does not change the result of a training; put it under set"
        if field in DECIDED and any(map(is_auto, domain.options())):
            yield f"search.{field}: auto is decided once for all trials; name values, or set auto in the config"
        if space.trials_per_worker > 1 and not field.startswith(SAME_BASE):
            yield f"search.{field}: trials_per_worker > 1 allows only adapter.* and train.* here"
    base = _applied(config, {**NO_GATE, **space.set}, f"{where}: set")
    # The trials themselves, as far as it takes a second. Those of Optuna are not known, so draws of the same space.
    count = 200
    if space.searcher != "tpe":
        count = min(space.count(), count)
    for number in range(count):
        changes = space.values(space.drawn(number))
        trial = _applied(base, changes, f"{where}: search")
        # The config turns the text '8' into the number 8, but a search compares values as the file has them.
        for field, value in changes.items():
            taken = at(trial, field)
            if isinstance(value, str) and isinstance(taken, int | float):
                yield f"search.{field}: {value!r} is text; write {json.dumps(taken)} without quotes"
    for field in space.search:
        if not any(overlap(field, name) for name in flatten(base)):  # e.g. data.train.00.weight
            yield f"search.{field}: unknown field; olora-ray finetune --help all lists the fields"
    yield from _metric_problems(space, base)


def overlap(field: str, other: str) -> bool:
    return field == other or field.startswith(f"{other}.") or other.startswith(f"{field}.")


def _objective(space: Space, config: Config) -> Objective:
    name = str(space.set.get("train.objective", config.train.objective))
    if is_auto(name):
        name = objective_decision(config).value
    return objective_named(name)


def _metric_problems(space: Space, config: Config) -> Iterator[str]:
    objective = _objective(space, config)
    held_out = config.data.holds_out()
    if space.metric.startswith("score/") and space.metric != "score/":
        if not config.evaluation.scorer or not held_out:
            yield f"metric: {space.metric} needs evaluation.scorer and held-out rows in the config"
        if space.scheduler.kind != "none":
            yield f"metric: {space.metric} is measured once, at the end; set scheduler.kind: none"
    elif space.metric not in (*objective.measures(), "train/loss"):
        known = ", ".join(objective.measures())
        yield (
            f"metric: train.objective={objective.name} does not report {space.metric!r}; use {known}, train/loss or"
            " score/NAME"
        )
    elif space.metric.startswith("eval/") and not held_out:
        yield f"metric: {space.metric} needs held-out rows: set data.eval or data.eval_fraction"

    for field in space.search:
        if space.metric in SCALES.get(field, ()):
            yield f"search.{field}: it changes the scale of {space.metric}; set metric: eval/pairs/preferred"


def _applied(config: Config, changes: Draws, where: str) -> Config:
    try:
        return override(config, changes)
    except UserError as error:
        text = str(error).removeprefix("config: ")
        if "fractional part" in text:
            text += "; use quniform with whole numbers, or choice"
        raise UserError(f"{where}: {text}") from None


# These decide whether a model can be trained and exported, because some methods do not support every layer.
DECIDE = (
    "model.name",
    "model.revision",
    "model.quantization",
    "adapter.method",
    "adapter.targets",
    "export.merged",
)


def plan(config: Config, data: DataDecisions, space: Space, base: Base) -> None:
    """Log which layers the trials adapt and how large the adapters are, at the largest rank of the space.

    `base` is the model of the config, `data` what was decided for it. Raises one UserError with all problems: an
    unknown scorer and, for each setting of the trials, unknown targets, an impossible rank, or layers that could be
    trained but not exported.
    """
    problems: dict[str, str] = {}
    for where, changes in _settings(config, space):
        try:
            trial = override(config, changes)
            own = base
            found = replace(data, config=override(data.config, changes))
            if trial.model != config.model:
                own = open_base(trial)
            if trial.model != config.model or trial.data != config.data:
                found = prepare.read_data(trial, own)
            prepare.check_settings(trial)
            here = ClusterFacts.here(config.cluster)
            decided = decide(trial, found, own.model, here, trial=True)
            prepare.plan(decided, own.model, where)
            shared_work.check_ranks(decided.config, space, decided.size.targets)
        except UserError as error:
            # The same error of several settings is shown once.
            problems.setdefault(str(error), f"{where}{error}")
    if problems:
        raise of_problems("the search cannot start", list(problems.values()))


def _settings(config: Config, space: Space) -> Iterator[tuple[str, Values]]:
    largest = {}
    if "adapter.rank" in space.search:
        largest["adapter.rank"] = max(space.possible("adapter.rank", config.adapter.rank))
    options = {}
    for field, domain in space.search.items():
        if any(overlap(field, name) for name in DECIDE):
            options[field] = domain.options()
    settings: list[Values] = []
    if space.has_default() and options:
        settings.append({})
    for values in itertools.product(*options.values()):
        settings.append(dict(zip(options, values, strict=True)))
    for changes in settings[:50]:  # a check takes as long as the preflight of a run
        where = ", ".join(f"search.{field}={value}" for field, value in changes.items())
        if where:
            where += ": "
        yield where, changes | largest
