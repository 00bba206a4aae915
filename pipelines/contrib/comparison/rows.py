"""The three sets of rows of a comparison: to train on, to choose learning rates on, and to compare on.

The content of a row alone decides its set. Rows are ordered by a hash of their content: the first become test rows, the
next tuning rows; equal rows are in the same set. With gate.group all rows of a group are in the same set, and a group
counts as one in the statistics. The rows are written as files in their own format:

<comparison>/rows/train-0.jsonl tuning-0.jsonl test-0.jsonl     one of each per source
<comparison>/rows/rows.json                                     digests, written last
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from comparison.arguments import Compare
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_json
from olora_ray.common.text import plural
from olora_ray.config.decided import DataConfig, DecidedConfig
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.config.section import Source
from olora_ray.data.formats import column_of, columns_of
from olora_ray.data.formats.format import Rejected
from olora_ray.data.reader import read_unit
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.manifest import Limits
from olora_ray.tokens.plan import Plan, Split
from olora_ray.tokens.prepare import plan_here

logger = logging.getLogger("olora_ray.comparison")

Kind = Literal["train", "tuning", "test"]
FILE = "@file"
"""The value of gate.group that makes the rows of each file a group."""


@dataclass(frozen=True)
class Row:
    source: int
    content: str
    """Digest of the columns that the format reads."""
    group: str
    """A value that all rows of its group share; without groups its content."""
    line: str


@dataclass(frozen=True)
class RowSets:
    sources: Mapping[Kind, tuple[Source, ...]]
    counts: Mapping[str, int]
    digests: Mapping[str, str]
    groups: Mapping[str, tuple[int, ...]]
    """Name of a file of test rows -> index of the group of each of its lines."""
    texts: dict[str, str]
    """Name of a file -> its rows as lines of JSON; empty once they are written."""

    def write(self, config: Config) -> None:
        """Write the files into the comparison's folder, unless they are there, and forget their texts."""
        folder = storage.join(config.folder(), "rows")
        file, described = (
            storage.join(folder, "rows.json"),
            json.dumps(dict(self.digests), indent=1) + "\n",
        )
        complete = all(
            storage.exists(storage.join(folder, name)) for name in (*self.texts, "rows.json")
        )
        if not (complete and storage.read_text(file) == described):
            for name, text in self.texts.items():
                storage.write_text(storage.join(folder, name), text)
            # Written last: with this file the row files are complete.
            storage.write_text(file, described)
        self.texts.clear()

    def contents(self) -> dict[str, str]:
        return {f"{kind} rows": digest for kind, digest in self.digests.items()}

    def config(
        self,
        config: DecidedConfig,
        held_out: Literal["tuning", "test"],
        changes: Mapping[str, object],
    ) -> DecidedConfig:
        """Return the config with these training rows, with the tuning or the test rows held out, and `changes`."""
        sources = {"data.train": self.sources["train"], "data.eval": self.sources[held_out]}
        rows: dict[str, object] = {"data.eval_fraction": None}
        for name, entries in sources.items():
            rows[name] = [each.model_dump(mode="json") for each in entries]
        return override(config, {**rows, **changes})


def split(config: DataConfig, compare: Compare, spec: TokenizerSpec) -> RowSets:
    """Read all rows, and return the three sets; the same rows always give the same sets.

    Raises UserError if there are too few rows, if too many cannot be read, or if no row has the column of gate.group.
    """
    # The sets are divided here, by content and group, so data.eval_fraction must not divide the rows again.
    config = override(config, {"data.eval_fraction": None})
    train = list(_read(config, spec, "train"))
    pool = list(_read(config, spec, "eval")) if config.data.eval else train
    _check_groups(config, pool)
    test, rest = _taken(pool, compare.test_rows)
    tuning, _ = _taken(rest, compare.tuning_rows)
    train = _without(train, [*test, *tuning], groups=not config.data.eval)
    sets: dict[Kind, list[Row]] = {"train": train, "tuning": tuning, "test": test}
    _check(config, compare, pool, sets)
    folder, lines = storage.join(config.folder(), "rows"), dict[str, list[str]]()
    for kind, rows in sets.items():
        for row in rows:
            lines.setdefault(_name(kind, row.source), []).append(f"{row.line}\n")
    return RowSets(
        {kind: tuple(_sources(config, folder, kind, rows)) for kind, rows in sets.items()},
        {kind: len(rows) for kind, rows in sets.items()},
        {
            kind: digest_json([[row.source, row.line] for row in rows], length=32)
            for kind, rows in sets.items()
        },
        _groups(test),
        {name: "".join(each) for name, each in lines.items()},
    )


def _read(config: DataConfig, spec: TokenizerSpec, split: Split) -> Iterator[Row]:
    plan, limits = plan_here(config, spec, split), Limits.of(config, split)
    pieces = {(piece.file, piece.unit) for piece in plan.pieces}
    # Each row is read once, whatever the weight of its source: a row that is repeated would count twice in a loss.
    rows, bad = 0, list[dict[str, Any]]()
    for number, unit in sorted(pieces, key=lambda item: (item[0], item[1].first)):
        planned = plan.files[number]
        source = plan.sources[planned.source]
        wanted = [*columns_of(source.format, source.fields), *_column(config, source)]
        for index, row in read_unit(planned.file, unit, planned.columns, wanted):
            rows += 1
            if isinstance(row, Mapping):
                yield _row(config, plan, number, row)
            else:
                why = (
                    row
                    if isinstance(row, Rejected)
                    else Rejected("not_an_object", "expected an object with fields")
                )
                place = {"source": planned.source, "file": planned.file.uri, "line": index + 1}
                bad.append({**place, "reason": why.reason, "message": why.message})
    limits.check(Counter(str(each["reason"]) for each in bad), rows, lambda: bad)
    if bad:
        logger.warning(
            f"{limits.setting}: {plural(len(bad), 'row')} left out, because they cannot be read"
        )


def _row(config: Config, plan: Plan, file: int, row: Mapping[str, Any]) -> Row:
    planned = plan.files[file]
    source = plan.sources[planned.source]
    content = _digest(
        [source.format, {name: row.get(name) for name in columns_of(source.format, source.fields)}]
    )
    group, columns = content, _column(config, source)
    if config.gate.group == FILE:
        group = _digest(planned.sha256)
    elif columns and row.get(columns[0]) not in (None, ""):
        group = _digest([columns[0], row[columns[0]]])
    return Row(planned.source, content, group, json.dumps(row, default=str))


def _column(config: Config, source: Source) -> list[str]:
    group = config.gate.group
    return [column_of(group, source.fields)] if group and group != FILE else []


def _check_groups(config: Config, pool: Sequence[Row]) -> None:
    # A row without the column, or with an empty one, is a group of its own, and so counts as independent of all others.
    alone = sum(row.group == row.content for row in pool)
    if config.gate.group in (None, FILE) or not alone:
        return
    if alone == len(pool):
        raise UserError(
            f"gate.group: no row of {_pool(config)} has a column {config.gate.group!r}; set it to a column of the"
            " rows, or to null if rows are independent"
        )
    rows = f"{plural(alone, 'row')} of {_pool(config)}"
    logger.warning(
        f"gate.group: {rows} have no {config.gate.group!r}; each counts as its own group"
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _taken(pool: Sequence[Row], number: int) -> tuple[list[Row], list[Row]]:
    """Return at least `number` different rows, as whole groups in the order of a hash, and the remaining rows."""
    groups: dict[str, dict[str, Row]] = {}
    for row in pool:
        groups.setdefault(row.group, {}).setdefault(row.content, row)
    taken: list[Row] = []
    for name in sorted(groups, key=lambda name: _digest(["set", name])):
        if len(taken) >= number:
            break
        taken += [groups[name][content] for content in sorted(groups[name])]
    return taken, _without(pool, taken, groups=True)


def _without(rows: Sequence[Row], others: Sequence[Row], groups: bool) -> list[Row]:
    """Return the rows that equal none of `others`; with `groups` also without the groups of `others`."""
    # With data.eval the user has decided which groups the held-out rows share with the training rows, so `groups` is
    # False for these.
    contents, named = (
        {row.content for row in others},
        {row.group for row in others} if groups else set(),
    )
    return [row for row in rows if row.content not in contents and row.group not in named]


def _check(
    config: Config, wanted: Compare, pool: Sequence[Row], sets: Mapping[Kind, Sequence[Row]]
) -> None:
    train, tuning, test = sets.values()
    if len(tuning) < wanted.tuning_rows or len(test) < wanted.test_rows:
        raise UserError(
            f"{_pool(config)}: its {len({row.content for row in pool}):,} different rows do not suffice for"
            f" compare.test_rows = {wanted.test_rows} and compare.tuning_rows = {wanted.tuning_rows}; add rows, or set"
            " these lower"
        )
    if len(train) < config.train.global_batch:
        raise UserError(
            f"data.train: {plural(len(train), 'row')} left to train on beside {len(tuning)} tuning and {len(test)} test"
            f" rows, fewer than train.global_batch = {config.train.global_batch}; add rows, or set"
            " compare.tuning_rows and compare.test_rows lower"
        )
    if len({row.group for row in test}) < 2:
        raise UserError(
            f"gate.group: all {len(test)} test rows are of one group, so the result would not hold for others; set"
            " compare.test_rows higher, or gate.group to null"
        )


def _pool(config: Config) -> str:
    return "data.eval" if config.data.eval else "data.train"


def _name(kind: Kind, source: int) -> str:
    return f"{kind}-{source}.jsonl"


def _sources(config: Config, folder: str, kind: Kind, rows: Iterable[Row]) -> Iterator[Source]:
    before = config.data.eval if config.data.eval and kind != "train" else config.data.train
    # The held-out loss counts every row once, so weights are for training alone.
    weight = {} if kind == "train" else {"weight": 1.0}
    for number in sorted({row.source for row in rows}):
        path = storage.join(folder, _name(kind, number))
        yield before[number].model_copy(update={"path": path, "only": (), **weight})


def _groups(rows: Sequence[Row]) -> dict[str, tuple[int, ...]]:
    numbers, files = dict[str, int](), dict[str, list[int]]()
    for row in rows:
        files.setdefault(_name("test", row.source), []).append(
            numbers.setdefault(row.group, len(numbers))
        )
    return {name: tuple(of_lines) for name, of_lines in files.items()}
