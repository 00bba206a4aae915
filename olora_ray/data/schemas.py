"""Published data sets whose columns have names of their own: what their rows mean (schemas.yaml)."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class Schema:
    set: str
    """Names of data sets with these columns."""
    columns: tuple[str, ...]
    """Columns that all of its rows have, perhaps beside others."""
    fields: Mapping[str, str] | None = None
    """In the form of a source's `fields`."""
    ask: str | None = None
    """Why a person must say which column is the answer."""


@cache
def known() -> tuple[Schema, ...]:
    text = Path(__file__).with_name("schemas.yaml").read_text(encoding="utf-8")
    return TypeAdapter(tuple[Schema, ...]).validate_python(yaml.safe_load(text))


def matching(rows: Sequence[Mapping[Any, Any]]) -> Schema | None:
    """Return the first schema whose columns all rows have."""
    if not rows:
        return None
    names = set.intersection(*({str(name) for name in row} for row in rows))
    for schema in known():
        if names.issuperset(schema.columns):
            return schema
    return None
