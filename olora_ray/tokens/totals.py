"""Totals over a store's shards: manifest, rejected rows, periodic progress."""

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from olora_ray.common import storage
from olora_ray.common.digests import digest
from olora_ray.common.errors import UserError
from olora_ray.tokens.manifest import REJECTED, Manifest, ShardInfo
from olora_ray.tokens.plan import Plan

logger = logging.getLogger(__name__)


SECONDS_BETWEEN_LINES = 10.0
EXAMPLES = 3
"""Rejected rows that an error message shows."""


@dataclass(frozen=True)
class Limits:
    """Limits of the rejected rows."""

    setting: str
    share: float

    def passed(self, reasons: Mapping[str, int], rows: int) -> bool:
        """Whether more than the allowed share of `rows` was rejected."""
        return sum(reasons.values()) > self.share * rows

    def check(self, reasons: Mapping[str, int], rows: int, uri: str) -> None:
        """Raise UserError, with counts and examples from rejected.jsonl, if too many of the rows were rejected."""
        bad = sum(reasons.values())
        if rows and bad == rows:
            what = f"none of the {rows:,} rows can be used"
        elif self.passed(reasons, rows):
            what = f"{bad:,} of {rows:,} rows cannot be used, more than data.max_rejected = {self.share:g} allows"
        else:
            return
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
        place = storage.join(uri, REJECTED)
        shown = [json.loads(line) for line in storage.read_text(place).splitlines()[:EXAMPLES]]
        first = "; ".join(f"{e['file']}:{e['line']}: {e['reason']}: {e['message']}" for e in shown)
        raise UserError(f"{self.setting}: {what} ({counts}); {first}; all in {place}")


@dataclass
class Totals:
    """Sums over the shards, added in their order."""

    plan: Plan
    infos: list[ShardInfo] = field(default_factory=list)
    total: "Counter[str]" = field(default_factory=Counter)
    reasons: "Counter[str]" = field(default_factory=Counter)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    notes: "Counter[str]" = field(default_factory=Counter)
    fresh_rows: int = 0
    """Rows of the shards that were made now."""
    started: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)

    @property
    def rows(self) -> int:
        """Rows read so far."""
        return self.total["rows"]

    def add(self, sidecar: dict[str, Any], fresh: bool) -> None:
        """Count a shard; `fresh` if it was made now."""
        self.infos.append(ShardInfo.of(sidecar))
        self.total.update({name: sidecar[name] for name in ("rows", "examples", "packs", "tokens", "supervised")})
        self.reasons.update(sidecar["reasons"])
        self.rejected.extend(sidecar["rejected"])
        self.notes.update(sidecar.get("notes", {}))  # a shard that was made before there were any has none
        self.fresh_rows += sidecar["rows"] * fresh
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            logger.info(self._line(now))

    def manifest(self) -> Manifest:
        """The manifest of the store, once all shards are added."""
        assert len(self.infos) == len(self.plan.shards)
        return Manifest(
            digest=self.plan.digest(),
            rejected=dict(sorted(self.reasons.items())),
            rejected_sha256=digest(rejected_text(self.rejected)),
            fill=round(self._fill(), 4),
            max_length=self.plan.max_length,
            files=tuple(each.file.uri for each in self.plan.files),
            shards=tuple(self.infos),
            inputs=self.plan.inputs(),
            notes=dict(sorted(self.notes.items())),
            **{name: self.total[name] for name in ("rows", "examples", "packs", "tokens", "supervised")},
        )

    def _fill(self) -> float:
        return self.total["tokens"] / max(1, self.total["packs"] * self.plan.max_length)

    def _line(self, now: float) -> str:
        speed = self.fresh_rows / max(now - self.started, 1e-3)
        left = max(self.plan.rows - self.rows, 0) / max(speed, 1e-3)
        return (
            f"tokens: {self.rows:,} rows, {len(self.infos):,} of {len(self.plan.shards):,} shards,"
            f" fill {self._fill():.2f}, {speed:,.0f} rows/s, ETA {left:,.0f} s"
        )


def rejected_text(rejected: Sequence[dict[str, Any]]) -> str:
    """The content of rejected.jsonl; a row that weights repeat is in it once."""
    lines = dict.fromkeys(json.dumps(entry, ensure_ascii=True) for entry in rejected)
    return "".join(f"{line}\n" for line in lines)


def summary(manifest: Manifest) -> str:
    """A complete store in one line."""
    rejected = sum(manifest.rejected.values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejected.items())
    return (
        f"{manifest.rows:,} rows{f' ({rejected:,} rejected: {reasons})' if rejected else ''},"
        f" {manifest.packs:,} sequences, {manifest.tokens:,} tokens, {manifest.supervised:,} supervised,"
        f" fill {manifest.fill:.2f}"
    )
