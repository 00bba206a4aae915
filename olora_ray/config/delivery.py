"""Sections of the config about what comes after a training: exports, registry, gate, next training, who is told."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from olora_ray.config.field_types import WEBHOOK, AliasName, ModelName, PositiveInt
from olora_ray.config.section import Section


class Export(Section):
    """What is written, and registered, when training has ended: the adapter always, with or without a merged model."""

    merged: bool = True
    """true: the base with the adapter merged in is written too, and registered; false: the adapter alone is, with its
    base model by reference (an adapter-only version)."""
    rank: PositiveInt | None = None
    """Compress the exported adapter to this rank, for servers with a limit; null: as it is (olora: 2 x rank)."""


class Registry(Section):
    """The registered model."""

    model: ModelName | None = None
    """Name under which the model is registered: up to 200 letters, digits, ' ', '.', '_', '-'; null: not registered."""
    alias: AliasName = "candidate"
    """Alias that the new version gets."""

    @field_validator("alias")
    @classmethod
    def _is_no_version(cls, alias: str) -> str:
        if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
            raise ValueError(f"{alias!r} is a name that MLflow keeps for itself (latest, v1, v2, ...); choose another")
        return alias


class Condition(Section):
    """A bound that a new version must keep, whatever the champion does."""

    metric: str
    """eval/loss, eval/perplexity, or eval/NAME of a score that evaluation.scorer gives."""
    at_least: float | None = None
    """Smallest value that passes."""
    at_most: float | None = None
    """Largest value that passes."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Condition":
        if self.at_least is None and self.at_most is None:
            raise ValueError("set at_least or at_most")
        return self


class Gate(Section):
    """Conditions under which a retrained version becomes the champion."""

    metric: str = "eval/loss"
    """Metric of the comparison: eval/loss, eval/perplexity (lower is better) or eval/NAME of a score (higher)."""
    must_improve_by: float = 0.0
    """Improvement that must be exceeded, surely (see confident); negative: may be worse by that much."""
    conditions: Annotated[tuple[Condition, ...], Field(alias="and")] = ()
    """Further conditions {metric: ..., at_least: ...} or at_most, on the new version alone."""
    on: Literal["held-out"] = "held-out"
    """Rows on which both are measured: those of data.eval or data.eval_fraction."""
    group: str | None = None
    """Column (or field) that the rows of one document or customer share; @file: all rows of a file; null: none."""
    min_rows: Annotated[int, Field(ge=2)] = 20
    """Fewest independent held-out rows (groups, with `group`) on which a champion is replaced."""
    level: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    """Confidence of the bootstrap interval of the improvement."""
    confident: bool = True
    """true: the lower end of that interval must lie above must_improve_by; false: its middle must reach that."""


class Retrain(Section):
    """Retraining by pipelines/retrain.py."""

    origin: Annotated[Literal["base", "champion"], Field(alias="from")] = "base"
    """base: train from the start on all data; champion: continue its adapter on new files and some old rows."""
    replay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """With `from: champion`: share of the rows of known files to train on again; others are drawn each night."""
    may_shrink: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Stop if the files of data.train have lost more than this share of the rows that the champion's had; 1: never."""
    wait: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds to wait for another retraining of the same model before giving up."""


class Notify(Section):
    """Notifications of a retraining: promoted, refused, failed, not finished."""

    url: Annotated[str, Field(pattern=WEBHOOK)] | None = None
    """Webhook that gets a POST of JSON: http(s)://..., or env:NAME or file:/PATH that holds it; null: none."""
    command: str | None = None
    """Shell command that gets the same JSON on its standard input; null: none."""
