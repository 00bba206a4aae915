"""Reader of space files: checks each against the config that it varies, before anything starts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.config.load import override, validated
from olora_ray.config.schema import Config
from olora_ray.config.yaml_io import parse_yaml
from olora_ray.sweep.space import LOWER_IS_BETTER, SAME_BASE, TIMES, Space

FIXED = ("run.", "tracking.", "registry.", "cluster.")
"""Sections that a search cannot vary: they say where and under which name, not what comes out."""


def load(path: str | Path, config: Config) -> Space:
    """Read a space file and check it against a config.

    Raises UserError that names the field of the file for unknown fields, empty ranges, values that the config
    refuses, and a metric that no trial would report.
    """
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"space file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"space file {path}: not UTF-8 text") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected fields (search:, metric:, ...), found {type(tree).__name__}")
    space = validated(Space, tree, str(path))
    check(space, config, str(path))
    return space


def check(space: Space, config: Config, where: str = "space") -> None:
    """Raise UserError unless every value the space can give is valid in the config, and its metric is reported."""
    for field in [*space.search, *space.set]:
        if field.startswith(FIXED):
            raise UserError(f"{where}: search.{field}: a search cannot vary {field.partition('.')[0]}.*")
        if space.trials_per_worker > 1 and field in space.search and not field.startswith(SAME_BASE):
            raise UserError(f"{where}: search.{field}: with trials_per_worker all trials share one base and its data")
    base = _override(config, space.set, f"{where}: set")
    for field, changes in _probes(space):
        _override(base, changes, f"{where}: search.{field}")
    _check_metric(space, base, where)


def _check_metric(space: Space, config: Config, where: str) -> None:
    scorer = config.evaluation.scorer
    held_out = config.data.holds_out()
    if space.metric.startswith("score/"):
        if not scorer or not held_out:
            raise UserError(f"{where}: metric: {space.metric} needs evaluation.scorer and held-out rows in the config")
        if space.scheduler.kind != "none":
            raise UserError(f"{where}: metric: {space.metric} is measured once, at the end: use scheduler.kind: none")
    elif space.metric not in LOWER_IS_BETTER:
        known = ", ".join(LOWER_IS_BETTER)
        raise UserError(f"{where}: metric: {space.metric!r} is never reported; use {known} or score/NAME")
    elif space.metric.startswith("eval/") and not held_out:
        raise UserError(f"{where}: metric: {space.metric} needs held-out rows: set data.eval or data.eval_fraction")


def _probes(space: Space) -> Iterator[tuple[str, dict[str, Any]]]:
    """(field, changes) such that all values are valid if these are: each field at its extremes."""
    usual = {field: domain.extremes()[0] for field, domain in space.search.items() if domain.of is None}
    for field, domain in space.search.items():
        if domain.of is None:
            for value in domain.extremes():
                yield field, {field: value}
            continue
        for factor in domain.factors():
            yield field, space.values({**usual, **_first_factors(space), field + TIMES: factor})


def _first_factors(space: Space) -> dict[str, float]:
    return {f"{field}{TIMES}": domain.factors()[0] for field, domain in space.search.items() if domain.of is not None}


def _override(config: Config, changes: Mapping[str, Any], where: str) -> Config:
    try:
        return override(config, changes)
    except UserError as error:
        text = str(error)
        raise UserError(f"{where}: {text.removeprefix('config: ')}") from None
