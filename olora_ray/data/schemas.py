"""Published data sets whose columns have names of their own: what their rows mean (schemas.yaml)."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
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
    return tuple(Schema(**entry) for entry in yaml.safe_load(text))


def matching(rows: Sequence[Mapping[Any, Any]]) -> Schema | None:
    """Return the first schema whose columns all rows have."""
    for schema in known():
        if rows and all({*schema.columns}.issubset(row) for row in rows):
            return schema
    return None
