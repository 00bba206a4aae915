"""Groups of held-out rows: rows of one document or customer are alike, so a comparison takes all of them or none."""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.data.reader import read_unit
from olora_ray.evaluation.rows import Origin, numbered
from olora_ray.tokens.plan import Plan
from olora_ray.tokens.store import TokenStore

logger = logging.getLogger(__name__)

FILE = "@file"
"""The setting by which the rows of a file are a group."""


def origins(store: TokenStore) -> tuple[Origin, ...]:
    """The number of its file, and its place in that, of each example of a store, in the order of the store."""
    number = {name: place for place, name in reversed(list(enumerate(store.files)))}
    found = (name.rpartition(":") for index in range(len(store)) for name in store.origins(index))
    return tuple((number[file], int(line) - 1) for file, _, line in found)


def group_numbers(setting: str | None, plan: Plan, origins: Sequence[Origin]) -> list[int] | None:
    """The number of each row's group, by gate.group; None without that setting: each row of a file is one.

    `plan` is that of the store from which the rows come. The column is read from the files again; rows in which it
    is empty are groups of their own. Raises UserError if no row has it.
    """
    if setting is None:
        return None
    if setting == FILE:
        return numbered([file for file, _ in origins])
    wanted = set(origins)
    values = {origin: value for origin, value in _values(setting, plan) if origin in wanted and value is not None}
    if not values:
        seen = ", ".join(sorted({name for file in plan.files for name in file.columns})) or "other fields"
        raise UserError(f"gate.group: no held-out row has a column {setting!r}; there are {seen}")
    if missing := len(wanted) - len(values):
        logger.warning(f"gate.group: {plural(missing, 'held-out row')} without {setting!r}: each is a group of its own")
    return numbered([(values[origin],) if origin in values else origin for origin in origins])


def _values(setting: str, plan: Plan) -> Iterator[tuple[Origin, str | None]]:
    """The column of every row of the held-out files, as JSON text."""
    pieces = {(piece.file, piece.unit) for shard in plan.shards for piece in shard}
    for number, unit in sorted(pieces, key=lambda item: (item[0], item[1].first)):
        planned = plan.files[number]
        column = plan.sources[planned.source].fields.get(setting, setting)
        for place, row in read_unit(planned.file, unit, planned.columns, [column]):
            yield (number, place), _text(row.get(column) if isinstance(row, dict) else None)


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else json.dumps(value, sort_keys=True, default=str)
