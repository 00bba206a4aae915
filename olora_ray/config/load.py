"""Configs from YAML files and nested mappings, validated as a whole, and written back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from olora_ray.common import secrets
from olora_ray.common.errors import UserError
from olora_ray.config.dotted import changed
from olora_ray.config.messages import explain, instead, relevant, texts
from olora_ray.config.schema import AnySection, Config
from olora_ray.config.yaml_io import Dumper, parse_yaml

ELSEWHERE = "compare"
"""Section that pipelines/compare.py reads from the file of a run's config; no setting of a run."""
_MOST_SHOWN = 20
"""Problems in one message."""


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """Read a config file and apply dotted `changes`.

    Raises UserError that lists every problem with its field.
    """
    return build(changed(read(path), changes or {}), str(path))


def read(path: str | Path) -> dict[str, Any]:
    """Read the sections of a config file, not validated yet."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"config file {path}: not UTF-8 text") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections (run:, model:, data:, ...), found {type(tree).__name__}")
    return tree


def build(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Validate a nested mapping into a Config; raises UserError with all problems together, and no secret in it.

    The section of another command may stand in the same file, and is left out.
    """
    return validated(Config, {name: section for name, section in tree.items() if name != ELSEWHERE}, where)


def validated(section: type[AnySection], tree: Mapping[str, Any], where: str) -> AnySection:
    """Validate a nested mapping into a section; raises UserError with all problems together, and no secret in it."""
    problems = [f"{field}: {instead(field, text)}" for field, text in texts(tree) if secrets.in_uri(text)]
    found = None
    try:
        found = section.model_validate(tree)
    except ValidationError as error:
        problems += [explain(item, section) for item in relevant(error.errors())]
    if problems or found is None:
        more = f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
        raise UserError("; ".join(f"{where}: {problem}" for problem in problems[:_MOST_SHOWN]) + more)
    return found


def override(config: AnySection, changes: Mapping[str, Any]) -> AnySection:
    """A new config with dotted fields changed, e.g. {"adapter.rank": 32}; validates everything again."""
    return validated(type(config), changed(config.model_dump(mode="json"), changes), "config")


def dump(config: Config) -> str:
    """The config as YAML that `load` reads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)
