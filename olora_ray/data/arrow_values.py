"""Rows of an Arrow batch, as plain values of Python."""

from typing import Any

import pyarrow as pa

from olora_ray.common.errors import first_line
from olora_ray.data.example import Rejected


def rows(batch: Any) -> list[Any]:
    """The rows of a batch; one with a text that is none is rejected alone: Arrow looks at texts only here."""
    names = batch.schema.names
    try:
        return [dict(zip(names, row, strict=True)) for row in zip(*map(_values, batch.columns), strict=True)]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [Rejected("not_utf8", "not UTF-8 text")]
        return [row for number in range(batch.num_rows) for row in rows(batch.slice(number, 1))]


def _values(column: Any) -> list[Any]:
    """The values of a column; where Python has none for a time (year 10000, a zone without rules) they are texts."""
    try:
        found = column.to_pylist()
        return [_with_objects(value, column.type) for value in found] if _has_maps(column.type) else found
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError, LookupError) as error:
        if pa.types.is_nested(column.type):
            return [f"<{first_line(error)}>"] * len(column)
        zoned = pa.types.is_timestamp(column.type)
        plain = column.cast(pa.timestamp(column.type.unit)) if zoned else column
        return plain.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]


def _has_maps(kind: Any) -> bool:
    return pa.types.is_map(kind) or any(_has_maps(kind.field(number).type) for number in range(kind.num_fields))


def _with_objects(value: Any, kind: Any) -> Any:
    """A value of an Arrow type with its maps as objects; Spark makes one of each dict, pyarrow pairs of each."""
    if value is None:
        return None
    if pa.types.is_map(kind):
        return {key: _with_objects(each, kind.item_type) for key, each in value}
    if pa.types.is_struct(kind):
        inner = {field.name: field.type for field in kind}
        return {name: _with_objects(each, inner[name]) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_objects(each, kind.value_type) for each in value]
    return value
