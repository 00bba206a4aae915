"""Totals over a store's shards: manifest, rejected rows, periodic progress."""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.config.evaluation import AnyConfig
from olora_ray.tokens import remedies
from olora_ray.tokens.manifest import Manifest, ShardInfo
from olora_ray.tokens.plan import Plan, Split, sources_of
from olora_ray.tokens.rejected import RejectedRows

logger = logging.getLogger(__name__)


SECONDS_BETWEEN_LINES = 10.0
EXAMPLES = 3
"""Rejected rows that an error message shows."""
ONE_OF = 10
"""Rows of which a single one may be rejected, whatever share of them it is: a few held-out rows may have an odd one."""


@dataclass(frozen=True)
class Limits:
    """Limits of the rejected rows of a split."""

    setting: str
    """The sources of the rows, as messages name them."""
    share: float
    """`data.max_rejected`."""

    @classmethod
    def of(cls, config: AnyConfig, split: Split) -> "Limits":
        """The limits of a split; held-out rows of `data.eval_fraction` are named as such."""
        setting, _ = sources_of(config, split)
        drawn = split == "eval" and config.data.eval_fraction is not None
        return cls(f"held out of {setting}" if drawn else setting, config.data.max_rejected)

    def allowed(self, rows: float) -> float:
        """Rows of `rows` that may be rejected: the share of them, and a single one of ONE_OF rows or more."""
        return max(self.share * rows, float(self.share > 0 and rows >= ONE_OF))

    def passed(self, reasons: Mapping[str, int], rows: float) -> bool:
        """Whether more than the allowed number of `rows` was rejected."""
        return sum(reasons.values()) > self.allowed(rows)

    def check(self, reasons: Mapping[str, int], rows: int, listed: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Raise UserError, with counts, examples of those `listed` and a remedy, if too many rows were rejected."""
        bad = sum(reasons.values())
        if rows and bad == rows:
            what = f"none of the {rows:,} rows can be used"
        elif self.passed(reasons, rows):
            what = f"{bad:,} of {rows:,} rows cannot be used, more than data.max_rejected = {self.share:g} allows"
        else:
            return
        shown = itertools.islice(listed(), EXAMPLES)
        first = "; ".join(f"{e['file']}:{e['line']}: {e['reason']}: {e['message']}" for e in shown)
        sources = {entry["source"] for entry in listed()}
        where = f"{self.setting}.{sources.pop()}" if len(sources) == 1 else self.setting
        remedy = remedies.remedy(reasons, listed(), rows, where)
        raise UserError(f"{where}: {what} ({reason_counts(reasons)}); {first}; {remedy}")


def reason_counts(reasons: Mapping[str, int]) -> str:
    """`no_answer 1, too_long 22`."""
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))


@dataclass
class Totals:
    """Sums over the shards, added in their order."""

    plan: Plan
    rejected: RejectedRows
    infos: list[ShardInfo] = field(default_factory=list)
    total: "Counter[str]" = field(default_factory=Counter)
    reasons: "Counter[str]" = field(default_factory=Counter)
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
        """Count a shard; `fresh` if it was made now, so that its rejected rows are taken as well."""
        if fresh:
            self.rejected.put(len(self.infos), sidecar["rejected"])
        self.infos.append(ShardInfo.of(sidecar))
        self.total.update({name: sidecar[name] for name in ("rows", "examples", "packs", "tokens", "supervised")})
        self.reasons.update(sidecar["reasons"])
        self.notes.update(sidecar.get("notes", {}))  # a shard that was made before there were any has none
        self.fresh_rows += sidecar["rows"] * fresh
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            logger.info(self._line(now))

    def check(self, limits: Limits) -> None:
        """Raise UserError if, of all the rows, too many were rejected or none is left."""
        limits.check(self.reasons, self.rows, lambda: self.rejected)
        if not self.total["packs"]:
            cause = f" (data.eval_fraction = {self.plan.eval_fraction:g})" if self.plan.eval_fraction else ""
            raise UserError(f"{limits.setting}: no row is left for {self.plan.split}{cause}")

    def hopeless(self, limits: Limits) -> bool:
        """Whether more rows were rejected already than all the rows of the plan allow."""
        return limits.passed(self.reasons, max(int(self.plan.rows), self.rows))

    def manifest(self) -> Manifest:
        """The manifest of the store, once all shards are added."""
        assert len(self.infos) == len(self.plan.shards)
        return Manifest(
            digest=self.plan.digest(),
            rejected=dict(sorted(self.reasons.items())),
            rejected_sha256=self.rejected.sha256(),
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


def summary(manifest: Manifest) -> str:
    """A complete store in one line."""
    rejected = sum(manifest.rejected.values())
    return (
        f"{manifest.rows:,} rows{f' ({rejected:,} rejected: {reason_counts(manifest.rejected)})' if rejected else ''},"
        f" {manifest.packs:,} sequences, {manifest.tokens:,} tokens, {manifest.supervised:,} supervised,"
        f" fill {manifest.fill:.2f}"
    )
