"""Groups of held-out rows: rows of one document or customer are alike, so a comparison takes all of them or none."""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.data.reader import Unit, read_unit
from olora_ray.evaluation.rows import Origin, numbered
from olora_ray.tokens.plan import Piece, Plan, taken
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
    pieces = {(piece.file, piece.unit) for shard in plan.shards for piece in shard}
    values = {
        origin: value
        for number, unit in sorted(pieces, key=lambda item: (item[0], item[1].first))
        for origin, value in _column(setting, plan, number, unit)
        if origin in wanted and value is not None
    }
    if not values:
        raise _no_column(setting, plan)
    if missing := len(wanted) - len(values):
        logger.warning(f"gate.group: {plural(missing, 'held-out row')} without {setting!r}: each is a group of its own")
    return numbered([(values[origin],) if origin in values else origin for origin in origins])


def check_column(setting: str | None, plan: Plan) -> None:
    """Raise UserError if no row of a plan's files has the column of gate.group, before anything is made of them.

    Reads no further than to the first row that has it.
    """
    if setting is None or setting == FILE:
        return
    pieces = (piece for shard in plan.shards for piece in shard)
    values = (value for piece in pieces for _, value in _column(setting, plan, piece.file, piece.unit))
    if all(value is None for value in values):
        raise _no_column(setting, plan)


def count_planned(setting: str | None, plan: Plan, enough: int, files: Collection[int] | None = None) -> int:
    """How many groups the rows of a plan are, at most, before one is tokenised; counting ends at `enough`.

    Rows that cannot be used count too. `files` are the numbers of those whose rows count; None: all.
    """
    found: set[object] = set()
    for piece in (piece for shard in plan.shards for piece in shard if files is None or piece.file in files):
        for group in _groups(setting, plan, piece):
            found.add(group)
            if len(found) >= enough:
                return enough
    return len(found)


def _groups(setting: str | None, plan: Plan, piece: Piece) -> Iterator[object]:
    """The group of each held-out row of a piece; a row of a file is one, and so is each without the column."""
    first = piece.unit.first
    places = np.arange(first, first + piece.unit.rows, dtype=np.int64)
    chosen: list[int] = places[taken(plan, plan.files[piece.file], piece, places)].tolist()
    if setting == FILE:
        yield from [piece.file][: len(chosen)]
    elif setting is None:
        yield from ((piece.file, place) for place in chosen)
    else:
        wanted = set(chosen)
        for (number, place), value in _column(setting, plan, piece.file, piece.unit):
            if place in wanted:
                yield (number, place) if value is None else (value,)


def _column(setting: str, plan: Plan, number: int, unit: Unit) -> Iterator[tuple[Origin, str | None]]:
    """The column of every row of a part of a file, as JSON text."""
    planned = plan.files[number]
    column = plan.sources[planned.source].fields.get(setting, setting)
    for place, row in read_unit(planned.file, unit, planned.columns, [column]):
        yield (number, place), _text(row.get(column) if isinstance(row, dict) else None)


def _no_column(setting: str, plan: Plan) -> UserError:
    seen = ", ".join(sorted({name for file in plan.files for name in file.columns})) or "other fields"
    return UserError(f"gate.group: no held-out row has a column {setting!r}; there are {seen}")


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else json.dumps(value, sort_keys=True, default=str)
