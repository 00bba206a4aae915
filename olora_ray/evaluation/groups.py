"""Groups of held-out rows: rows of one document or customer are alike, so a comparison draws all of them or none."""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from itertools import chain

import numpy as np

from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.data.formats import column_of
from olora_ray.data.reader import Unit, read_unit
from olora_ray.evaluation.rows import Origin
from olora_ray.tokens.plan import Piece, Plan
from olora_ray.tokens.store import TokenStore

logger = logging.getLogger(__name__)

FILE = "@file"
"""The value of gate.group that makes the rows of each file one group."""


def origins(store: TokenStore) -> tuple[Origin, ...]:
    """Return (number of the file, position of the row in it) for each example, in the order of the store."""
    # A file that is listed twice has its first number: reversed, so that the first entry overwrites the second.
    numbers = {name: number for number, name in reversed(list(enumerate(store.files)))}
    found = []
    for name in chain.from_iterable(map(store.origins, range(len(store)))):
        file, _, line = name.rpartition(":")
        found.append((numbers[file], int(line) - 1))
    return tuple(found)


def group_names(setting: str | None, plan: Plan, origins: Sequence[Origin]) -> list[str]:
    """Return the name of the group of each row by gate.group (`setting`); without it each row is its own group.

    A name follows from the contents: it is the group's value, or the SHA-256 of the file and the row's position. `plan`
    is the plan of the store from which the rows come. Reads the column from the source files again. A row with an empty
    column is its own group. Raises UserError if no row has the column.
    """
    if setting == FILE:
        return [plan.files[file].sha256 for file, _ in origins]
    own = {origin: f"{plan.files[origin[0]].sha256}:{origin[1]}" for origin in origins}
    if setting is None:
        return [own[origin] for origin in origins]
    pieces = {(piece.file, piece.unit) for piece in plan.pieces}
    values = {}
    for number, unit in sorted(pieces, key=lambda item: (item[0], item[1].first)):
        for origin, value in _column(setting, plan, number, unit):
            if origin in own and value is not None:
                values[origin] = value
    if not values:
        raise _no_column(setting, plan)
    missing = len(own) - len(values)
    if missing:
        logger.warning(
            f"gate.group: {plural(missing, 'held-out row')} without {setting!r}; each is its own group"
        )
    return [values.get(origin, own[origin]) for origin in origins]


def check_column(setting: str | None, plan: Plan) -> None:
    """Raise UserError if no row of a plan's files has the column of gate.group.

    Stops reading at the first row that has it, so the check is cheap enough to run before tokenisation.
    """
    if setting is None or setting == FILE:
        return
    for piece in plan.pieces:
        for _, value in _column(setting, plan, piece.file, piece.unit):
            if value is not None:
                return
    raise _no_column(setting, plan)


def count_planned(
    setting: str | None, plan: Plan, enough: int, files: Collection[int] | None = None
) -> int:
    """Return an upper bound for the number of groups, without tokenising; counting stops at `enough`.

    It is an upper bound because rows that tokenisation would reject count too. `files` limits the count to rows of the
    files with these numbers; None: all files.
    """
    groups: set[object] = set()
    for piece in plan.pieces:
        if files is not None and piece.file not in files:
            continue
        for group in _groups(setting, plan, piece):
            groups.add(group)
            if len(groups) >= enough:
                return enough
    return len(groups)


def _groups(setting: str | None, plan: Plan, piece: Piece) -> Iterator[object]:
    taken = np.flatnonzero(plan.taken(plan.files[piece.file], piece))
    chosen: list[int] = (piece.unit.first + taken).tolist()
    if setting == FILE:
        if chosen:
            yield piece.file
    elif setting is None:
        yield from ((piece.file, position) for position in chosen)
    else:
        wanted = set(chosen)
        for origin, value in _column(setting, plan, piece.file, piece.unit):
            if origin[1] in wanted:
                yield origin if value is None else (value,)


def _column(
    setting: str, plan: Plan, number: int, unit: Unit
) -> Iterator[tuple[Origin, str | None]]:
    planned = plan.files[number]
    column = column_of(setting, plan.sources[planned.source].fields)
    for position, row in read_unit(planned.file, unit, planned.columns, [column]):
        value = row.get(column) if isinstance(row, dict) else None
        text = None
        if value is not None and value != "":
            text = json.dumps(value, sort_keys=True, default=str)
        yield (number, position), text


def _no_column(setting: str, plan: Plan) -> UserError:
    names: set[str] = set()
    for file in plan.files:
        names.update(file.columns)
    columns = ", ".join(sorted(names)) or "the fields of your rows"
    return UserError(f"gate.group: no held-out row has a column {setting!r}; use one of {columns}")
