"""Formats of rows: one file per format, in the terms of format.py and chat.py. Their index is config/tables.py."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.config.section import Source, is_auto
from olora_ray.config.tables import FORMATS
from olora_ray.data.formats.format import (
    EXAMPLES,
    NONE,
    Chat,
    Completion,
    Example,
    Format,
    Rejected,
    Row,
    columns_in,
    type_name,
)


@cache
def format_named(name: str) -> Format:
    return FORMATS.load(name, Format)


@cache
def own_formats() -> tuple[Format, ...]:
    """Return the formats that are detected. A format of an installed package never is: installing it changes no run."""
    return tuple(format_named(name) for name in FORMATS.own)


@cache
def field_names(format: str) -> tuple[str, ...]:
    """Return the names that `fields` of a source may map; for format auto, those of all formats that are detected."""
    if not is_auto(format):
        return format_named(format).names
    return tuple(dict.fromkeys(name for each in own_formats() for name in each.names))


def to_example(
    format: str,
    columns: Any,
    fields: Mapping[str, str],
    as_chat: bool = False,
    source: Source | None = None,
) -> Example:
    """Read a raw row in `format`; raise Rejected if it cannot be used.

    `columns` may be a Rejected instead of a row: the reader could not read it. `as_chat` turns a prompt and its
    completion into a chat. `source` has what a source may say beside format and fields: roles, labels, system, markup.
    """
    if isinstance(columns, Rejected):
        raise columns
    if not isinstance(columns, Mapping):
        raise Rejected(
            "not_an_object", f"expected an object with fields, found {type_name(columns)}"
        )
    known = format_named(format)
    try:
        row = Row(columns, {**dict.fromkeys(known.asked, NONE), **fields}, as_chat)
        if source:
            markup = "none" if is_auto(source.markup) else source.markup
            row = row._replace(roles=source.roles, labels=source.labels, markup=markup)
        example = known.read(row)
    except RecursionError:
        raise Rejected("wrong_type", "nested too deeply") from None
    if not isinstance(example, EXAMPLES[known.makes]):
        raise TypeError(
            f"format {format} says makes={known.makes!r}, but read() returns {type(example).__name__}"
        )
    if source and source.system:
        return _with_system(example, source.system)
    return example


def _with_system(example: Example, system: str) -> Example:
    if isinstance(example, Completion):
        raise Rejected("no_chat", "system needs a chat: set chat: true, or remove system")
    if not isinstance(example, Chat) or example.messages[0]["role"] in ("system", "developer"):
        return example
    first = {"role": "system", "content": system}
    return example._replace(messages=(first, *example.messages))


def check_fields(format: str, fields: Mapping[str, str], where: str) -> None:
    """Raise UserError if `fields` maps a name that the format does not have; `where` is the setting of the source.

    Any name may be mapped to `NONE`: its column, or key of a message, is left out.
    """
    known = field_names(format)
    unknown = [name for name, column in fields.items() if name not in known and column != NONE]
    if unknown:
        raise UserError(
            f"{where}.fields: format {format} has no field {unknown[0]!r}; it has {', '.join(known)}"
        )


def columns_of(format: str, fields: Mapping[str, str]) -> list[str]:
    """Return the top-level columns that a format reads with these fields."""
    known = format_named(format)
    columns: dict[str, None] = {}
    for name in known.names:
        if name in fields or name not in known.asked:
            columns |= dict.fromkeys(columns_in(fields.get(name, name)))
    return list(columns)


def column_of(name: str, fields: Mapping[str, str]) -> str:
    """Return what `fields` says for a name that need not be a field; its own column if that is left out."""
    column = fields.get(name)
    if column is None or column == NONE:
        return name
    return column
