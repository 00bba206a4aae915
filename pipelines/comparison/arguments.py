"""The command line of pipelines/compare.py and its section of the config; imports nothing slow."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from comparison import grid
from olora_ray.common.errors import UserError
from olora_ray.config import command_line
from olora_ray.config.command_line import resolved
from olora_ray.config.load import build, changed, flatten, override, read, validated
from olora_ray.config.schema import Adapter, Config, Section

logger = logging.getLogger("olora_ray.comparison")

OPTIONS = ("--methods", "--seeds", "--budget")
SEEDS = 4
LEVEL = 0.95
"""Confidence level of all intervals."""
SAME = {
    "adapter.dropout": 0.0,
    "train.weight_decay": 0.0,
    "train.early_stop": None,
    "registry.model": None,
}
"""Fields with one value for all trainings of a comparison, whatever the config says."""

Rows = Annotated[int, Field(ge=2)]


class Compare(Section):
    """Comparison of methods by pipelines/compare.py. Its settings are fixed before the first training."""

    tuning_rows: Rows = 192
    """Rows on which the learning rate of each method is chosen. No training uses them, and none is a test row."""
    test_rows: Rows = 192
    """Rows on which the methods are compared, each at its own learning rate and with other seeds."""
    relevant: Annotated[float, Field(gt=0.0)] = 0.01
    """Smallest difference of the held-out loss that matters, in nats per supervised token."""
    untuned: bool = True
    """Also train each method at the config's train.lr, to show what a comparison without tuning would have said."""


class ComparedConfig(Config):
    """The file of pipelines/compare.py: a run's config plus the section `compare`."""

    compare: Compare = Compare()


@dataclass(frozen=True)
class Comparison:
    config: Config
    """The config under the comparison's own run.name, with the fields of `SAME`."""
    compare: Compare
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    """run.seed of the compared trainings; none is the config's own, which the tuning uses."""
    budget: float | None
    """Seconds that it may take; None: no limit."""

    def arms(self) -> list[grid.Arm]:
        adapter = self.config.adapter
        return grid.arms(self.methods, adapter.alpha, adapter.rank)

    def untuned(self) -> list[grid.Cell]:
        """Return the points at the config's own learning rate; none if compare.untuned is false."""
        lr = self.config.train.lr
        if not self.compare.untuned or lr == "auto":
            return []
        return [grid.Cell(each, float(self.config.adapter.alpha), lr) for each in self.methods]


def parse(argv: Sequence[str], usage: str) -> Comparison:
    """Return the comparison of `CONFIG.yaml [section.field=value ...] --methods A,B [--seeds 4] [--budget 3h]`.

    --help prints `usage` and the fields, and exits. Raises UserError for unknown words and wrong values.
    """
    parsed = command_line.parse(argv, usage, options=OPTIONS, fields=ComparedConfig)
    if len(files := parsed.names()) != 1:
        raise UserError(f"arguments {' '.join(files) or '(none)'}: expected a config file; --help shows how")
    tree = changed(read(files[0]), parsed.changes())
    compared = validated(ComparedConfig, tree, files[0])
    config = resolved(build(tree, files[0]), Path.cwd())
    methods = _methods(parsed.options.get("--methods", "lora,olora"))
    seeds = _seeds(config, parsed.options.get("--seeds", str(SEEDS)))
    budget = _seconds(parsed.options["--budget"]) if "--budget" in parsed.options else None
    _check(config)
    own = {"run.name": f"{config.run.name}-compare", "cluster.workers": config.cluster.min_workers()}
    return Comparison(override(config, {**SAME, **own}), compared.compare, methods, seeds, budget)


def _methods(text: str) -> tuple[str, ...]:
    known = known_methods()
    names = tuple(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"argument --methods: {unknown[0]!r} is no adapter.method; use some of {', '.join(known)}")
    if grid.BASELINE not in names:
        raise UserError(f"argument --methods: {grid.BASELINE} is missing: all others are compared with it")
    if len(names) < 2:
        raise UserError(f"argument --methods: name at least one besides {grid.BASELINE}, e.g. lora,olora")
    return names


def known_methods() -> tuple[str, ...]:
    return get_args(Adapter.model_fields["method"].annotation)


def _seeds(config: Config, text: str) -> tuple[int, ...]:
    if not text.isdecimal() or not 2 <= int(text) <= 100:
        raise UserError(f"argument --seeds: expected 2 to 100, not {text!r}; with one seed a difference may be luck")
    return tuple((config.run.seed + number) % 2**31 for number in range(1, int(text) + 1))


def _seconds(text: str) -> float:
    # `3h`, `1h30m`, `90m`, or `5400` for seconds.
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms]?)", text)
    seconds = sum(float(number) * {"h": 3600.0, "m": 60.0}.get(unit, 1.0) for number, unit in parts)
    if "".join(map("".join, parts)) != text or not seconds > 0:
        raise UserError(f"argument --budget: expected a time such as 3h, 90m or 1h30m, not {text!r}")
    return seconds


def _check(config: Config) -> None:
    if config.train.start is not None:
        raise UserError("train.start: a comparison compares ways to start, so set it to null")
    flat = flatten(config)
    for field, value in SAME.items():
        if field != "registry.model" and flat[field] != value:
            shown = "null" if value is None else f"{value:g}"
            logger.info(f"{field}: {shown} in all trainings of a comparison, instead of the config's {flat[field]}")
