"""The plan of a search, before tokens and factors are made: what its trials train, and whether it can be exported.

A single run is asked the same (pipeline/report.py). Of a search every setting is that decides over an export; in all
else its trials differ by numbers, so that one stands for many.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import report
from olora_ray.pipeline.base import open_base
from olora_ray.sweep import shared_work
from olora_ray.sweep.load_space import overlap
from olora_ray.sweep.space import Space

DECIDE = ("model.name", "model.revision", "model.quantization", "adapter.method", "adapter.targets", "export.merged")
"""Fields on which it depends whether something can be trained and exported: not every method takes every layer."""
MOST_TRIED = 50
"""Combinations of their values that are tried: each takes as long as the same look at a single run."""


def plan(config: Config, space: Space, base: BaseModel) -> None:
    """Say what the trials adapt and how large they are, at the largest rank of the space.

    `base` is the model of the config. Raises one UserError with all that cannot be: a scorer that there is not, and
    for each setting that trials have, targets or a rank that the model does not have, and layers that could be
    trained and not be exported.
    """
    report.check_scorer(config)
    problems: dict[str, str] = {}
    found = []
    for where, changes in _settings(config, space):
        try:
            trial = override(config, changes)
            model = base if trial.model == config.model else open_base(trial).model
            size = report.deliverable(trial, model)
            shared_work.check_ranks(trial, space, size.targets)
            found.append((where, trial, size))
        except UserError as error:
            problems.setdefault(str(error), f"{where}{error}")  # of several settings the same once
    if problems:
        raise UserError("; ".join(problems.values()))
    for where, trial, size in found:
        report.say(trial, size, where)


def _settings(config: Config, space: Space) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each setting that is to be tried: its name for a message, and its changes of the config."""
    searched = "adapter.rank" in space.search
    largest = {"adapter.rank": max(space.possible("adapter.rank", config.adapter.rank))} if searched else {}
    options = {field: domain.options() for field, domain in space.search.items() if _decides(field)}
    drawn = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    of_config: list[dict[str, Any]] = [{}] if space.has_default() and options else []
    for changes in [*of_config, *drawn][:MOST_TRIED]:
        shown = ", ".join(f"search.{field}={value}" for field, value in changes.items())
        yield f"{shown}: " if shown else "", changes | largest


def _decides(field: str) -> bool:
    return any(overlap(field, name) for name in DECIDE)
