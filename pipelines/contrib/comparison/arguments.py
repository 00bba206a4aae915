"""The command line of `olora-ray compare` and its section of the config; imports nothing slow."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from olora_ray.common.errors import UserError
from olora_ray.config import command_line, tables
from olora_ray.config.command_line import resolved
from olora_ray.config.load import (
    build,
    changed,
    flatten,
    override,
    parse_assignments,
    read_tree,
    validated,
)
from olora_ray.config.schema import Config
from olora_ray.config.section import NAME, AnySection, Section

logger = logging.getLogger("olora_ray.comparison")

ARM, METHODS, SEEDS = "--arm", "--methods", "--seeds"
FEW_SEEDS = 4
"""Intervals of fewer seeds are wide."""
LEVEL = 0.95
"""Confidence level of all intervals."""
METHOD, LR, FACTOR = "adapter.method", "train.lr", "train.lr_factor"
SAME = {
    "adapter.dropout": 0.0,
    "train.weight_decay": 0.0,
    "train.early_stop": None,
    "registry.model": None,
}
"""Fields with one value for all trainings, whatever the config says; an arm may set the first two."""
OF_COMPARISON = (FACTOR, "train.start", "train.early_stop", "train.eval_every")
"""Fields of adapter and train that an arm cannot set."""

Rows = Annotated[int, Field(ge=2)]
Positive = Annotated[float, Field(gt=0.0)]


class Compare(Section):
    """Comparison of arms by `olora-ray compare`. Its settings are fixed before the first training."""

    tuning_rows: Rows = 192
    """Rows on which the learning rate of each arm is chosen. No training uses them, and none is a test row."""
    test_rows: Rows = 192
    """Rows on which the arms are compared, each at its own learning rate and with other seeds."""
    relevant: Positive = 0.01
    """Smallest difference of the held-out loss that matters, in nats per supervised token."""
    rates: Annotated[tuple[Positive, ...], Field(min_length=3)] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Learning rates that every arm is tuned on, increasing, as multiples of its automatic rate (or of its train.lr,
    if the arm sets it)."""

    @field_validator("rates")
    @classmethod
    def _increase(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if any(first >= second for first, second in pairwise(rates)):
            raise ValueError("must be increasing")
        return rates


class ComparedConfig(Config):
    """The file of `olora-ray compare`: a run's config plus the section `compare`."""

    compare: Compare = Compare()


@dataclass(frozen=True)
class Arm:
    name: str
    values: Mapping[str, Any]
    """Dotted field -> value, over the config."""

    def config(self, config: AnySection) -> AnySection:
        return override(config, self.values)


@dataclass(frozen=True)
class Trial:
    """One training of a comparison. Its name, and so its folder, follows from what it is."""

    arm: Arm
    factor: float
    """Multiple of the arm's learning rate."""
    seed: int
    values: Mapping[str, Any]

    def name(self) -> str:
        return f"{self.arm.name}-x{self.factor:g}-seed{self.seed}"


@dataclass(frozen=True)
class Comparison:
    config: Config
    """The config under the comparison's own run.name, with the fields of `SAME`."""
    own: Config
    """The user's config."""
    compare: Compare
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    """run.seed of the compared trainings; none is the config's own, which the tuning uses."""

    @property
    def baseline(self) -> Arm:
        """The arm with which all others are compared: `lora` if there is one, otherwise the first."""
        return next((arm for arm in self.arms if arm.name == "lora"), self.arms[0])

    def trial(self, arm: Arm, factor: float, seed: int) -> Trial:
        return Trial(
            arm, factor, seed, {LR: "auto", **arm.values, FACTOR: factor, "run.seed": seed}
        )

    def tuning(self) -> list[Trial]:
        """Return the trials of the tuning: as many for each arm, with one seed."""
        return [
            self.trial(arm, factor, self.config.run.seed)
            for arm in self.arms
            for factor in self.compare.rates
        ]


def parse(argv: Sequence[str], usage: str) -> Comparison:
    """Return the comparison that a command line asks for.

    --help prints `usage` and the fields, and exits. Raises UserError for unknown words and wrong values.
    """
    parsed = command_line.parse(argv, usage, options=(ARM, METHODS, SEEDS), fields=ComparedConfig)
    if len(files := parsed.names()) != 1:
        raise UserError(
            f"arguments {' '.join(files) or '(none)'}: expected a config file; --help shows how"
        )
    tree = changed(read_tree(files[0]), parsed.changes())
    compared = validated(ComparedConfig, tree, files[0])
    config = resolved(build(tree, files[0]), Path.cwd())
    texts = [text for name, text in parsed.given if name == ARM]
    methods = parsed.options.get(METHODS, "" if texts else "lora,olora")
    seeds = _seeds(config, parsed.options.get(SEEDS, str(FEW_SEEDS)))
    _check(config)
    named = {
        "run.name": f"{config.run.name}-compare",
        "cluster.workers": config.cluster.each_trial(),
    }
    own, config = config, override(config, {**SAME, **named})
    arms = _distinct([*_methods(methods), *(_arm(text, config) for text in texts)])
    return Comparison(config, own, compared.compare, arms, seeds)


def _methods(text: str) -> Iterator[Arm]:
    known = tables.METHODS.names()
    for name in dict.fromkeys(name for part in text.split(",") if (name := part.strip())):
        if name not in known:
            raise UserError(
                f"argument {METHODS}: {name!r} is no adapter.method; use some of {', '.join(known)}, or --arm"
            )
        yield Arm(name, {METHOD: name})


def _arm(text: str, config: Config) -> Arm:
    name, colon, fields = (part.strip() for part in text.partition(":"))
    if not colon or not re.match(NAME, name) or not fields:
        raise UserError(
            f"argument {ARM} {text!r}: expected 'NAME: field=value, field=value'; see --help"
        )
    # A comma inside a value, as in adapter.targets=[q_proj, v_proj], is not followed by a field.
    values = parse_assignments(re.split(r"\s*,\s*(?=[a-z_]+\.[a-z_.]+=)", fields))
    for field in values:
        if not field.startswith(("adapter.", "train.")) or field.startswith(OF_COMPARISON):
            raise UserError(
                f"argument {ARM} {name}: {field} cannot differ between arms; use fields of adapter and train except"
                f" {', '.join(OF_COMPARISON)}"
            )
    try:
        override(config, values)
    except UserError as error:
        raise UserError(f"argument {ARM} {name}: {str(error).removeprefix('config: ')}") from None
    return Arm(name, values)


def _distinct(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    names = [arm.name for arm in arms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"argument {ARM} {twice[0]}: two arms have this name; choose another")
    if len(arms) < 2:
        raise UserError(
            f"argument {ARM}: a comparison needs two arms or more, e.g. {METHODS} lora,olora"
        )
    return tuple(arms)


def _seeds(config: Config, text: str) -> tuple[int, ...]:
    if not text.isdecimal() or not 2 <= int(text) <= 100:
        raise UserError(
            f"argument {SEEDS}: expected 2 to 100, not {text!r}; with one seed a difference may be luck"
        )
    return tuple((config.run.seed + number) % 2**31 for number in range(1, int(text) + 1))


def _check(config: Config) -> None:
    if config.train.start is not None:
        raise UserError("train.start: a comparison compares ways to start, so set it to null")
    flat = flatten(config)
    for field, value in SAME.items():
        if field != "registry.model" and flat[field] != value:
            shown = "null" if value is None else f"{value:g}"
            logger.info(
                f"{field}: {shown} in all trainings of a comparison, instead of the config's {flat[field]}"
            )
