"""The three sets of rows of a comparison: to train on, to choose learning rates on, and to compare on.

A row's set follows from its content alone: rows are taken in the order of a hash of what is in them, first the test
rows, then the tuning rows; equal rows lie in one set. With gate.group all rows of a group lie in one set, and a group
counts as one in the statistics. They are written as files of the format that they had:

<comparison>/rows/train-0.jsonl tuning-0.jsonl test-0.jsonl     one of each for a source
<comparison>/rows/rows.json                                     digests and counts, written last
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from comparison.arguments import Compare
from comparison.folder import has_begun
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_json
from olora_ray.common.text import plural
from olora_ray.config.load import override
from olora_ray.config.schema import Config, Source
from olora_ray.data.formats import Rejected, columns_of
from olora_ray.data.reader import read_unit
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.manifest import Limits
from olora_ray.tokens.plan import Plan, Split
from olora_ray.tokens.prepare import plan_here

logger = logging.getLogger("olora_ray.comparison")

Kind = Literal["train", "tuning", "test"]
FILE = "@file"
"""The value of gate.group by which the rows of a file are a group."""


@dataclass(frozen=True)
class Row:
    """A row as it was read."""

    source: int
    """Number of its source in data.train or data.eval."""
    content: str
    """Digest of what the format reads of it."""
    group: str
    """What it shares with the rows of its group; without groups its content."""
    line: str
    """As JSON."""


@dataclass(frozen=True)
class RowSets:
    """Where the rows of a comparison lie."""

    sources: Mapping[Kind, tuple[Source, ...]]
    counts: Mapping[str, int]
    digests: Mapping[str, str]
    groups: Mapping[str, tuple[int, ...]]
    """Name of a file of test rows -> number of the group of each of its lines."""

    def contents(self) -> dict[str, str]:
        """The digests, by what they are of."""
        return {f"{kind} rows": digest for kind, digest in self.digests.items()}

    def config(self, config: Config, held_out: Literal["tuning", "test"]) -> Config:
        """The config with these training rows, and one of the two other sets held out."""
        sources = {"data.train": self.sources["train"], "data.eval": self.sources[held_out]}
        changes = {name: [each.model_dump(mode="json") for each in found] for name, found in sources.items()}
        return override(config, {"data.eval_fraction": None, **changes})


def split(config: Config, compare: Compare, spec: TokenizerSpec) -> RowSets:
    """Read all rows, and write the three sets; the same rows give the same sets again.

    Raises UserError if there are too few, if too many cannot be read, if none has the column of gate.group, or if the
    comparison was begun with others.
    """
    setting = "data.eval" if config.data.eval else "data.train"
    config = override(config, {"data.eval_fraction": None})
    train = list(_read(config, spec, "train"))
    pool = list(_read(config, spec, "eval")) if config.data.eval else train
    _check_groups(config, setting, pool)
    test, rest = _taken(pool, compare.test_rows)
    tuning, _ = _taken(rest, compare.tuning_rows)
    train = _without(train, [*test, *tuning], groups=not config.data.eval)
    _check(config, compare, setting, pool, train, tuning, test)
    return _written(config, compare, {"train": train, "tuning": tuning, "test": test})


def _read(config: Config, spec: TokenizerSpec, split: Split) -> Iterator[Row]:
    """All rows of a split, each once whatever its source's weight; those that cannot be read are counted."""
    plan, limits = plan_here(config, spec, split), Limits.of(config, split)
    pieces = {(piece.file, piece.unit) for shard in plan.shards for piece in shard}
    rows, bad = 0, list[dict[str, Any]]()
    for number, unit in sorted(pieces, key=lambda item: (item[0], item[1].first)):
        planned = plan.files[number]
        source = plan.sources[planned.source]
        wanted = [*columns_of(source.format, source.fields), *_column(config, source)]
        for place, row in read_unit(planned.file, unit, planned.columns, wanted):
            rows += 1
            if isinstance(row, Mapping):
                yield _row(config, plan, number, row)
            else:
                why = row if isinstance(row, Rejected) else Rejected("not_an_object", "expected an object with fields")
                bad.append(
                    {"source": planned.source, "file": planned.file.uri, "line": place + 1, "reason": why.reason,
                     "message": why.message}
                )  # fmt: skip
    limits.check(Counter(str(each["reason"]) for each in bad), rows, lambda: bad)
    if bad:
        logger.warning(f"{limits.setting}: rows that cannot be read, and are in no set: {len(bad)}")


def _row(config: Config, plan: Plan, file: int, row: Mapping[str, Any]) -> Row:
    planned = plan.files[file]
    source = plan.sources[planned.source]
    content = _digest([source.format, {name: row.get(name) for name in columns_of(source.format, source.fields)}])
    group, columns = content, _column(config, source)
    if config.gate.group == FILE:
        group = _digest(planned.sha256)
    elif columns and row.get(columns[0]) not in (None, ""):
        group = _digest([columns[0], row[columns[0]]])
    return Row(planned.source, content, group, json.dumps(row, default=str))


def _column(config: Config, source: Source) -> list[str]:
    """The column of gate.group in the files of a source."""
    group = config.gate.group
    return [source.fields.get(group, group)] if group and group != FILE else []


def _check_groups(config: Config, setting: str, pool: Sequence[Row]) -> None:
    """Raise UserError if gate.group is a column of no row: each row would count as independent of all others."""
    alone = sum(row.group == row.content for row in pool)  # without the column, or empty there
    if config.gate.group in (None, FILE) or not alone:
        return
    if alone == len(pool):
        raise UserError(
            f"gate.group: no row of {setting} has a column {config.gate.group!r}; set it to one that they have, or to"
            " null where rows are independent"
        )
    logger.warning(
        f"gate.group: {plural(alone, 'row')} of {setting} without {config.gate.group!r}: each is a group of its own"
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _taken(pool: Sequence[Row], number: int) -> tuple[list[Row], list[Row]]:
    """At least so many different rows in the order of a hash of their groups, as whole groups; and the others."""
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
    """The rows that are not like one of the others, and with `groups` in no group of theirs.

    Whoever has held rows out with data.eval has decided what their groups have to do with the training rows.
    """
    contents, named = {row.content for row in others}, {row.group for row in others} if groups else set()
    return [row for row in rows if row.content not in contents and row.group not in named]


def _check(
    config: Config,
    wanted: Compare,
    setting: str,
    pool: Sequence[Row],
    train: Sequence[Row],
    tuning: Sequence[Row],
    test: Sequence[Row],
) -> None:
    distinct = len({row.content for row in pool})
    if len(tuning) < wanted.tuning_rows or len(test) < wanted.test_rows:
        raise UserError(
            f"{setting}: its {distinct:,} different rows do not suffice for compare.test_rows = {wanted.test_rows}"
            f" and compare.tuning_rows = {wanted.tuning_rows}; give more rows, or set these lower"
        )
    if len(train) < config.train.global_batch:
        raise UserError(
            f"data.train: {plural(len(train), 'row')} left to train on beside {len(tuning)} tuning and {len(test)} test"
            f" rows, fewer than train.global_batch = {config.train.global_batch}; give more rows, or set"
            " compare.tuning_rows and compare.test_rows lower"
        )
    if len({row.group for row in test}) < 2:
        raise UserError(
            f"gate.group: all of the {len(test)} test rows are of one group, which says nothing of others; set"
            " compare.test_rows higher, or gate.group to null"
        )


def _written(config: Config, compare: Compare, sets: Mapping[Kind, Sequence[Row]]) -> RowSets:
    folder = storage.join(config.folder(), "rows")
    found = RowSets(
        {kind: tuple(_sources(config, folder, kind, rows)) for kind, rows in sets.items()},
        {kind: len(rows) for kind, rows in sets.items()},
        {kind: digest_json([[row.source, row.line] for row in rows], length=32) for kind, rows in sets.items()},
        _groups(sets["test"]),
    )
    if has_begun(config.folder()) and _there(storage.join(folder, "rows.json"), found):
        return found
    for kind, rows in sets.items():
        for number in {row.source for row in rows}:
            text = "".join(f"{row.line}\n" for row in rows if row.source == number)
            storage.write_text(storage.join(folder, _name(kind, number)), text)
    described = {"rows": found.counts, "digests": found.digests, "compare": compare.model_dump()}
    storage.write_text(storage.join(folder, "rows.json"), json.dumps(described, indent=1) + "\n")
    return found


def _there(place: str, found: RowSets) -> bool:
    """Whether these rows are there already; raises UserError if the comparison was begun with others."""
    try:
        before = json.loads(storage.read_text(place))["digests"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if changed := [kind for kind, digest in found.digests.items() if before.get(kind) != digest]:
        raise UserError(
            f"data: the {changed[0]} rows are not those that this comparison was begun with ({place}); choose another"
            " run.name, or delete its folder"
        )
    return all(storage.exists(source.path) for sources in found.sources.values() for source in sources)


def _name(kind: Kind, source: int) -> str:
    return f"{kind}-{source}.jsonl"


def _sources(config: Config, folder: str, kind: Kind, rows: Iterable[Row]) -> Iterator[Source]:
    """The sources as before, but for the place of the rows; weights are for training alone."""
    before = config.data.eval if config.data.eval and kind != "train" else config.data.train
    for number in sorted({row.source for row in rows}):
        changes: dict[str, Any] = {"path": storage.join(folder, _name(kind, number)), "only": ()}
        yield before[number].model_copy(update=changes if kind == "train" else {**changes, "weight": 1.0})


def _groups(rows: Sequence[Row]) -> dict[str, tuple[int, ...]]:
    numbers: dict[str, int] = {}
    files: dict[str, list[int]] = {}
    for row in rows:
        files.setdefault(_name("test", row.source), []).append(numbers.setdefault(row.group, len(numbers)))
    return {name: tuple(found) for name, found in files.items()}
