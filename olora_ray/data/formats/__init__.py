"""Formats of rows: one file per format, in the terms of format.py and chat.py. Their index is config/tables.py."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.config.section import is_auto
from olora_ray.config.tables import FORMATS
from olora_ray.data.formats.format import EXAMPLES, NONE, Example, Format, Rejected, Row, type_name


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
    format: str, columns: Any, fields: Mapping[str, str], as_chat: bool = False
) -> Example:
    """Read a raw row in `format`; raise Rejected if it cannot be used.

    `columns` may be a Rejected instead of a row: the reader could not read it. `as_chat` turns a prompt and its
    completion into a chat.
    """
    if isinstance(columns, Rejected):
        raise columns
    if not isinstance(columns, Mapping):
        raise Rejected(
            "not_an_object", f"expected an object with fields, found {type_name(columns)}"
        )
    known = format_named(format)
    try:
        example = known.read(Row(columns, {**dict.fromkeys(known.asked, NONE), **fields}, as_chat))
    except RecursionError:
        raise Rejected("wrong_type", "nested too deeply") from None
    if not isinstance(example, EXAMPLES[known.makes]):
        raise TypeError(
            f"format {format} says makes={known.makes!r}, but read() returns {type(example).__name__}"
        )
    return example


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
    known = format_named(format)
    return [
        fields.get(name, name) for name in known.names if name in fields or name not in known.asked
    ]


def column_of(name: str, fields: Mapping[str, str]) -> str:
    """Return the column of a name that need not be a field, also if the format is to leave it out."""
    column = fields.get(name)
    if column is None or column == NONE:
        return name
    return column
