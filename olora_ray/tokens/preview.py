"""Preview of a token store for --dry-run, from the first rows of the data and without Ray."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.data.scan import FileScan, head, scan
from olora_ray.data.sources import File, total_bytes
from olora_ray.data.tokenize import TokenizerSpec
from olora_ray.tokens import manifest, notes
from olora_ray.tokens import shard as shards
from olora_ray.tokens.plan import Plan, make_plan, sample, sources_of

logger = logging.getLogger(__name__)

SCAN_ALL = 64 * 2**20
"""Bytes up to which all files are scanned; of larger data only the start of a few files is read."""
FILES_LOOKED_AT = 4
"""Files of each source, when the data is larger."""


@dataclass(frozen=True)
class Preview:
    """An epoch of the training data."""

    rows: int
    packs: int
    tokens: int
    supervised: int
    fill: float
    """Tokens / (packs * max_length)."""
    rejected: dict[str, int]
    """Of the rows that were read."""
    exact: bool
    """False: rows, packs, tokens and supervised are estimates."""
    input_ids: NDArray[np.int32]
    """The first example."""
    mask: NDArray[np.bool_]
    """Its supervised tokens."""
    origin: str
    """Its origin, as file:line."""
    files: int


def describe(config: Config, spec: TokenizerSpec, limit: int = 2000) -> Preview:
    """Preview the training data from about `limit` rows, without Ray; raises UserError."""
    look = _Look(config)
    plan = make_plan(config, spec, "train", look)
    for line in notes.form_lines(plan):
        logger.info(line)
    part = sample(plan, limit)
    shard = shards.build(part, 0)
    for line in notes.lines(shard.notes):
        logger.info(f"of the rows that were read, {line}")
    if not shard.examples:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in _reasons(shard).items())
        first = "".join(f"; {e['file']}:{e['line']}: {e['reason']}: {e['message']}" for e in shard.rejected[:1])
        setting = sources_of(config, "train")[0]
        raise UserError(f"{setting}: none of the {shard.rows:,} rows that were read can be used ({counts}){first}")
    exact = look.complete and len(part.shards[0]) == sum(len(pieces) for pieces in plan.shards)
    rows = look.rows * plan.kept_share
    return _preview(part, shard, exact, 1.0 if exact else rows / max(part.rows, 1.0))


def _preview(part: Plan, shard: shards.Shard, exact: bool, scale: float) -> Preview:
    tokens = sum(len(example.ids) for example in shard.examples)
    supervised = sum(int(example.supervised.sum()) for example in shard.examples)
    first = shard.packs[0][0]
    return Preview(
        rows=round(shard.rows * scale),
        packs=round(len(shard.packs) * scale),
        tokens=round(tokens * scale),
        supervised=round(supervised * scale),
        fill=tokens / (len(shard.packs) * part.max_length),
        rejected=_reasons(shard),
        exact=exact,
        input_ids=shard.examples[first].ids,
        mask=shard.examples[first].supervised,
        origin=manifest.place_name([each.file.uri for each in part.files], shard.origins[first]),
        files=len(part.files),
    )


def _reasons(shard: shards.Shard) -> dict[str, int]:
    return dict(sorted(Counter(str(entry["reason"]) for entry in shard.rejected).items()))


class _Look:
    """Scans small data as a whole, and looks at the start of a few files of large data."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.complete = True
        self.rows = 0.0
        """Rows of an epoch, weights included."""

    def __call__(self, sources: Sequence[Sequence[File]]) -> list[list[FileScan]]:
        self.complete = sum(total_bytes(files) for files in sources) <= SCAN_ALL
        scans = [self._source(files) for files in sources]
        for source, files, found in zip(self._config.data.train, sources, scans, strict=True):
            seen = total_bytes(files if self.complete else files[:FILES_LOOKED_AT])
            self.rows += source.weight * sum(each.rows for each in found) * total_bytes(files) / max(seen, 1)
        return scans

    def _source(self, files: Sequence[File]) -> list[FileScan]:
        if self.complete:
            return [scan(file, self._config.run.storage) for file in files]
        unseen = FileScan("", 0, (), ())
        return [head(file) if number < FILES_LOOKED_AT else unseen for number, file in enumerate(files)]
