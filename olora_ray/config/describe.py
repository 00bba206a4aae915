"""The schema in words: what a field may hold, its default as it stands in a config, and the fields for --help."""

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from olora_ray.config.schema import Condition, Config, Data, Section, Source

NAMES = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", NoneType: "`null`"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
WIDTH = 112
"""Columns of --help."""


def name_of(section: type[Section]) -> str:
    """The name of a section that is an entry of a list, as `source`."""
    return section.__name__.lower()


def shape(annotation: Any, limits: Sequence[Any] = (), entry: Callable[[type[Section]], str] = name_of) -> str:
    """What a field may hold, in words; `limits` are pydantic's constraints, `entry` names a section."""
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        found = [limit for one in inner[1:] for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return shape(inner[0], [*limits, *found], entry)
    if kind in (Union, UnionType):
        return " or ".join(shape(part, (), entry) for part in inner)
    if kind is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if kind is tuple:
        return _tuple([shape(part, (), entry) for part in inner if part is not Ellipsis], Ellipsis in inner, limits)
    if kind is dict:
        return f"mapping of {shape(inner[0], (), entry)} to {shape(inner[1], (), entry)}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return entry(annotation)
    return " ".join([NAMES[annotation], *_bounds(limits)])


def plain(value: Any) -> str:
    """A default as it would stand in a config."""
    return value if isinstance(value, str) else json.dumps(value, default=list)


def default(field: FieldInfo) -> str:
    """A field's default as it would stand in a config, or `required`."""
    return "required" if field.is_required() else plain(field.get_default(call_default_factory=True))


def help_text(config: type[Section] = Config) -> str:
    """Every field of a config with what it may hold, its default and its docstring, by section."""
    lines = []
    for name, field in config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        lines.append(f"{name}:")
        lines.extend(_section(section, "  "))
    return "\n".join(lines)


def _section(section: type[Section], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = shape(field.annotation, field.metadata).replace("`", "")
        text = " ".join(f"{field.description} ({kind}) [{default(field)}]".split())
        start = f"{indent}{field.alias or name:<18} "
        yield textwrap.fill(
            text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
        )
        if name == "train" and section is Data:
            yield from _section(Source, indent + "    ")
        if name == "conditions":
            yield from _section(Condition, indent + "    ")


def _tuple(parts: Sequence[str], any_number: bool, limits: Sequence[Any]) -> str:
    if not any_number:
        return f"list [{', '.join(parts)}]"
    least = next((limit.min_length for limit in limits if hasattr(limit, "min_length")), 0)
    return f"list of {parts[0]}" + (f", {least} or more" if least else "")


def _bounds(limits: Sequence[Any]) -> Iterator[str]:
    """`(≥ 0, < 1)`; what has no bounds (patterns, validators) is told by the description."""
    found = [
        f"{sign} {getattr(limit, name):.10g}"
        for limit in limits
        for name, sign in BOUNDS.items()
        if hasattr(limit, name)
    ]
    if found:
        yield f"({', '.join(found)})"
