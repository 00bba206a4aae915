"""Dotted fields: a config as flat names and values, and changes given by such names."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from olora_ray.common import secrets
from olora_ray.common.errors import UserError
from olora_ray.config import words
from olora_ray.config.schema import Section
from olora_ray.config.yaml_io import parse_yaml

SOURCES = ("data.train.", "data.eval.")
"""Fields of sources, which may be given as a path alone."""
NUMBERED = re.compile(r"data\.(train|eval)\.[0-9]+(\..+)?")
"""A source by its number, or a field of it."""


def parse_assignments(given: list[str]) -> dict[str, Any]:
    """`section.field=value` words of a command line as changes; values are YAML."""
    changes = {}
    for word in given:
        field, equals, value = word.partition("=")
        if not equals or "." not in field or "" in field.split("."):
            meant = words.advice(field) if equals else None
            hint = f"; {meant}" if meant else ""
            raise UserError(f"argument {secrets.mask(word)!r}: expected section.field=value{hint}")
        changes[field] = parse_yaml(value, f"argument {secrets.mask(word)!r}")
    return changes


def flatten(config: Section) -> dict[str, Any]:
    """Dotted field -> plain value, for MLflow parameters and comparisons."""
    return dict(leaves(config.model_dump(mode="json"), ""))


def leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted name and plain value of all below `prefix`; of lists only those of mappings are entered."""
    items: Any = ()
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        yield prefix, value
    for key, item in items:
        yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))


def at(config: Section, field: str, default: Any = None) -> Any:
    """The plain value of a dotted field, also of one that `flatten` enters: a section, a list of mappings."""
    node: Any = config.model_dump(mode="json")
    for part in field.split("."):
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and (place := _place(part, node)) is not None:
            node = node[place]
        else:
            return default
    return node


def changed(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with dotted fields set; raises UserError for a field that cannot be reached."""
    result: dict[str, Any] = {key: _copy(value) for key, value in tree.items()}
    for field, value in changes.items():
        if found := NUMBERED.fullmatch(field):
            _number_sources(result.get("data"), found[1])
        node: Any = result
        *parents, last = field.split(".")
        for part in parents:
            node = _child(node, part, field)
        if isinstance(node, list):
            if (place := _place(last, node)) is None:
                raise UserError(f"{field}: the list has {len(node)} entries, counted from 0")
            node[place] = value
        else:
            node[last] = value
    return result


def _number_sources(data: Any, name: str) -> None:
    """Write sources as a list of mappings, as the schema reads them: one alone is a list of one, a path a source."""
    if isinstance(data, dict):
        given = data.get(name)
        sources = given if isinstance(given, list) else [given or {}]
        data[name] = [{"path": source} if isinstance(source, str) else source for source in sources]


def _child(node: Any, part: str, field: str) -> Any:
    found = None
    if isinstance(node, list) and (place := _place(part, node)) is not None:
        found = node[place]
    elif isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        found = node[part]
    if isinstance(found, dict | list):
        return found
    if isinstance(found, str) and field.startswith(SOURCES):
        raise UserError(f"{field}: {part!r} is a path alone, without fields; write it as {{path: ...}}")
    raise UserError(f"{field}: {part!r} has no fields to set")


def _place(part: str, node: list[Any]) -> int | None:
    """The place in a list that a part of a field's name is, if it is one."""
    return int(part) if re.fullmatch(r"[0-9]{1,9}", part) and int(part) < len(node) else None


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value
