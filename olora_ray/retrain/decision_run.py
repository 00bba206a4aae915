"""MLflow runs of a retraining's decisions, with reason and versions; and what MLflow tells of the nights."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from olora_ray.common.errors import UserError, short_reason
from olora_ray.common.secrets import looked_up, mask
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import Fingerprint
from olora_ray.retrain import notify
from olora_ray.retrain.recipe import CHANGED, Baseline, shrunk_to
from olora_ray.tracking import old_versions
from olora_ray.tracking.aliases import CHAMPION, Aliases
from olora_ray.tracking.checksums import AGAINST, Version
from olora_ray.tracking.run import newest_runs
from olora_ray.tracking.start import resolve_uri, start_run

logger = logging.getLogger(__name__)

# Tag of a version: the numbers behind the gate's decision, as JSON.
DETAILS = "olora.gate_details"
# Tag of a version: the MLflow run of the gate's decision on it; empty while that run does not exist.
RECORDED = "olora.decision_run"
# Tag of a version: the digest of its checksums when a change after its verdict was told.
CHANGE_TOLD = "olora.change_told"
What = Literal["unchanged", "promoted", "refused", "failed", "moved"]


@dataclass(frozen=True)
class Entry:
    decision: What
    reason: str
    challenger: str | None = None
    """Number of the version."""
    champion: str | None = None
    """Number of the version that was the champion before."""
    details: Mapping[str, Any] = field(default_factory=dict)


def write_decision(config: Config, entry: Entry) -> str:
    """Create the MLflow run of a decision; return its id. Raises TrackingUnavailable if MLflow does not answer."""
    name = str(config.registry.model)
    interval = entry.details.get("improvement")
    tags = {
        "olora.kind": "retraining",
        "olora.model": name,
        "olora.decision": entry.decision,
        "olora.reason": entry.reason,
        "mlflow.note.content": _note(name, entry),
    }
    for role, number in _roles(entry):
        if number:
            tags[f"olora.{role}"] = f"{name}/{number}"
    if interval:
        tags["olora.interval"] = (
            f"{interval['mean']:.6f} [{interval['low']:.6f}, {interval['high']:.6f}]"
        )
    tracker = start_run(config, f"{name} {entry.decision}", tags)
    metrics = {}
    for part in ("challenger", CHAMPION, "improvement", "anchor", "guard"):
        for measure, value in (entry.details.get(part) or {}).items():
            metrics[f"{part}/{measure}"] = float(value)
    for use, value in entry.details.get("uses", {}).items():
        if isinstance(value, int):
            metrics[f"rows/{use}"] = float(value)
    tracker.metrics({0: metrics})
    shown = {
        "decision": entry.decision,
        "reason": entry.reason,
        **dict(_roles(entry)),
        **entry.details,
    }
    tracker.text(json.dumps(shown, indent=2) + "\n", "decision.json")
    tracker.end("FAILED" if entry.decision == "failed" else "FINISHED")
    return tracker.run_id


def entry_of(version: Version) -> Entry:
    """Return the decision on a version, by the gate or by hand, as its tags have it."""
    tags = version.tags
    decision: What = "refused"
    if version.accepted:
        decision = "promoted"
    reason = version.verdict.partition(": ")[2] or version.verdict
    if tags.get(CHANGED):
        reason += f"; {tags[CHANGED]}"
    details = json.loads(tags.get(DETAILS, "{}"))
    return Entry(decision, reason, version.number, tags.get(AGAINST) or None, details)


def of_version(config: Config, version: Version) -> None:
    """Write and tell the gate's decision on a version once; it is read from its tags, so a crash loses nothing."""
    tags = version.tags
    if not version.verdict or AGAINST not in tags or tags.get(RECORDED):
        return
    if shrunk_to(version) is not None:  # the decision on the shrunk version is the night's
        return
    entry = entry_of(version)
    run_id = write_decision(config, entry)
    # Before the tag: a call that is killed here tells again, instead of never.
    notify.tell(config, entry.decision, entry.reason, entry.challenger, entry.champion)
    Aliases(resolve_uri(config), version.name).tag_version(version.number, RECORDED, run_id)


def changed(config: Config, aliases: Aliases, version: Version) -> None:
    """Tell once that a version was changed after its verdict."""
    try:
        version.refuse_changed()
    except UserError as error:
        if version.tags.get(CHANGE_TOLD) != version.checksum:
            logger.error(str(error))
            notify.tell(config, "changed", str(error), version.number)
            aliases.tag_version(version.number, CHANGE_TOLD, version.checksum)


def moved(config: Config, now: Baseline) -> None:
    """Write and tell, once, that the champion is not the one of the latest decision: a person has moved the alias."""
    last = _latest(config, but="failed")
    if last is None or now.version is None:
        return
    number = now.version.number
    role = CHAMPION
    if last.data.tags.get("olora.decision") in ("promoted", "moved"):
        role = "challenger"
    left = last.data.tags.get(f"olora.{role}", "").rpartition("/")[2]
    if left == number:
        return
    verdicts = {version.number: version.verdict for version in now.versions if version.rolled_back}
    how = verdicts.get(left)
    if not how:
        how = now.version.verdict
        if not how or how.startswith(("passed", "refused")):  # by the gate
            how = "its alias was set or deleted in MLflow"
    before = f"version {left}" if left else "none"
    reason = f"the champion is version {number}, but the latest decision left {before}: {how}"
    notify.tell(config, "moved", reason, number, left or None)
    write_decision(config, Entry("moved", reason, number, left or None))


def unchanged(config: Config, entry: Entry) -> None:
    """Write that nothing has changed, unless the latest run says the same: a scheduler may call every minute."""
    last = _latest(config)
    if last is not None:
        tags = last.data.tags
        if (tags.get("olora.decision"), tags.get("olora.reason")) == (entry.decision, entry.reason):
            return
    write_decision(config, entry)


def _of_model(name: str) -> str:
    return f"tags.`olora.kind` = 'retraining' and tags.`olora.model` = '{name}'"


def _latest(config: Config, but: str | None = None) -> Any:
    words = _of_model(str(config.registry.model))
    if but is not None:
        words += f" and tags.`olora.decision` != '{but}'"
    runs = newest_runs(resolve_uri(config), words, 1, config.tracking.experiment)
    return next(iter(runs), None)


def _roles(entry: Entry) -> list[tuple[str, str | None]]:
    return [("challenger", entry.challenger), (CHAMPION, entry.champion)]


def _note(name: str, entry: Entry) -> str:
    parts = [f"**{entry.decision}**: {entry.reason}"]
    for role, number in _roles(entry):
        if number:
            parts.append(f"{role}: [{name} version {number}](#/models/{name}/versions/{number})")
    for score, rows in entry.details.get("lost", {}).items():
        examples = ", ".join(rows["examples"])
        parts.append(
            f"{score}: {rows['rows']} right answers of the champion are wrong now, such as {examples}"
        )
    return "\n\n".join(parts)


# Nights, as MLflow alone tells of them.

# Tag of a registered model: the end of its last good night, in seconds since 1970.
GOOD = "olora.last_good_night"


@dataclass(frozen=True)
class Nights:
    """Facts about the nights of a model; times are seconds since 1970."""

    good: float | None
    """End of the last good night; None: no night has ended well since this is recorded."""
    champion: Version | None
    since: float
    """Time of the champion's promotion, or of its creation if something else than this project moved the alias."""
    decided: float
    """Time of the last promotion or refusal; 0: none."""
    decisions: list[dict[str, str]]
    """Tags of the latest runs of decisions, the newest first, with the run's time as `when`."""
    uses: int
    """Number of versions that were decided on the current held-out rows."""
    used_since: float


def nights(aliases: Aliases) -> Nights:
    """Ask MLflow alone about the nights of a model that is registered; this writes nothing."""
    versions = aliases.versions()
    runs = newest_runs(aliases.uri, _of_model(aliases.name), 30)
    alias = aliases.current().get(CHAMPION)
    champion = next((each for each in versions if each.number == alias), None)
    since = 0.0
    if champion is not None:
        since = aliases.champion_since(champion)
    good = aliases.tags().get(GOOD)
    told = [{**run.data.tags, "when": str(run.info.start_time / 1000)} for run in runs]
    decided = [
        float(run["when"]) for run in told if run["olora.decision"] in ("promoted", "refused")
    ]
    known = [*old_versions.pruned(aliases), *versions]
    judged = [version for version in known if version.verdict and AGAINST in version.tags]
    rows = [Fingerprint.from_tags(version.tags).held_out for version in judged]
    same = [each.created for each, digest in zip(judged, rows, strict=True) if digest == rows[-1]]
    return Nights(
        None if good is None else float(good),
        champion,
        since,
        max(decided, default=0.0),
        told,
        len(same),
        min(same, default=0.0),
    )


def good_night(config: Config, aliases: Aliases) -> None:
    """Record the end of a good night in MLflow, and write the metrics of nights to the config's retrain.metrics."""
    aliases.tag(GOOD, f"{time.time():.0f}")
    if config.retrain.metrics:
        try:
            _export(aliases, looked_up(config.retrain.metrics, "its address"))
        except Exception as error:  # metrics must not change the result of the retraining
            logger.warning(f"retrain.metrics: not written: {mask(short_reason(error))}")


# Metric in Prometheus -> field of Nights, description.
METRICS = {
    "olora_night_last_success_timestamp_seconds": ("good", "End of the last good night"),
    "olora_night_last_decision_timestamp_seconds": ("decided", "Last promotion or refusal"),
    "olora_champion_since_timestamp_seconds": ("since", "Promotion of the champion"),
    "olora_held_out_uses": ("uses", "Versions that were decided on the current held-out rows"),
}


def _export(aliases: Aliases, target: str) -> None:
    from prometheus_client import CollectorRegistry, Gauge, push_to_gateway, write_to_textfile

    registry = CollectorRegistry()
    found = nights(aliases)
    for metric, (name, text) in METRICS.items():
        gauge = Gauge(metric, text, ["model"], registry=registry)
        value = getattr(found, name)
        if value:  # no sample is better than an age since 1970
            gauge.labels(aliases.name).set(value)
    if target.startswith("/"):
        write_to_textfile(target, registry)
    else:
        push_to_gateway(target, "olora_ray", registry, {"model": aliases.name}, timeout=5)
