"""The config of a call from Python: a config with changes, or a model with rows, for which `init` writes one."""

import sys
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from olora_ray.calls import rows
from olora_ray.calls.script import script
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config import command_line
from olora_ray.config.load import build, changed, keyword, parse_yaml, spelling_advice
from olora_ray.config.schema import Config

SOURCES = {"data": "data.train", "eval": "data.eval"}
"""Argument of a call -> its field."""


def config_of(
    config: str | PathLike[str] | Mapping[str, Any] | None,
    changes: Mapping[str, Any],
    data: Mapping[str, rows.Given],
) -> Config:
    """Return the config of a training, with absolute paths; rows in memory are written below the run's folder.

    `changes` are dotted fields, `data` the rows of SOURCES. Without a config, the model and the rows decide as in
    `olora-ray init`. Raises UserError for what is missing or wrong.
    """
    texts = {}
    given: dict[str, Any] = {}
    for argument, field in SOURCES.items():
        value = data.get(argument)
        if value is not None:
            given[field], texts[field] = rows.sources(value, argument)
    if "data.eval" in given:
        given["data.eval_fraction"] = None
    given |= changes  # they may change a field of a source

    def read() -> Config:
        if config is None:
            return build(changed({}, given), "arguments")
        return command_line.loaded(config, given)

    if any(texts.values()) or config is None:
        # Validated before the first file is written. An automatic name has the digests of these rows in it.
        first = read()
        if config is None and "run.name" not in given:
            given["registry.model"] = None  # nobody would look for that name
        given["run.name"] = first.run.name
        root = command_line.absolute(first.run.storage, command_line.lasting())
        for field, text in texts.items():
            if text:
                rows.write(given[field], text, storage.join(root, first.run.name, "rows"))
    if config is not None:
        return read()
    written = parse_yaml(script("init").config_text(read()), "arguments")
    # The written config has the sources with their formats.
    own = {field: value for field, value in given.items() if field not in SOURCES.values()}
    return command_line.resolved(build(changed(written, own), "arguments"))


def changes_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords as dotted fields: a name that only one section has, or a section as a mapping.

    A path or a function becomes its name. Raises UserError for a keyword that is no field.
    """
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        if name in Config.model_fields and isinstance(value, Mapping):
            changes |= {f"{name}.{inner}": each for inner, each in value.items()}
            continue
        field = keyword(name)
        if field is None:
            advice = spelling_advice(name) or "use changes={'section.field': value}"
            raise UserError(f"{name}: no field has exactly this name; {advice}")
        changes[field] = value
        if isinstance(value, PathLike):
            changes[field] = fspath(value)
        elif callable(value):
            changes[field] = _name_of(field, value)
    return changes


def _name_of(field: str, function: Any) -> str:
    # Scorers run in this process, which finds a function of a notebook in its module __main__.
    name = getattr(function, "__qualname__", "")
    if getattr(sys.modules.get(function.__module__), name, None) is not function:
        raise UserError(
            f"{field}: {name} is not found by its name; define it with def, outside of other functions"
        )
    return f"{function.__module__}:{name}"
