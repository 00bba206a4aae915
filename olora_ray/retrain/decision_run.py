"""MLflow runs of a retraining's decisions: the decision, its reason, and the versions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from olora_ray.config.schema import Config
from olora_ray.retrain import notify
from olora_ray.retrain.recipe import AGAINST, CHANGED, ToBeat
from olora_ray.tracking.aliases import CHAMPION
from olora_ray.tracking.checksums import Version
from olora_ray.tracking.client import connect, reachable
from olora_ray.tracking.start import resolve_uri, start_run

# Tag of a version: the numbers behind the gate's decision, as JSON.
DETAILS = "olora.gate_details"
# Tag of a version: the MLflow run of the gate's decision on it; empty while that run does not exist.
RECORDED = "olora.decision_run"
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
    tags |= {f"olora.{role}": f"{name}/{number}" for role, number in _roles(entry) if number}
    if interval:
        tags["olora.interval"] = f"{interval['mean']:.6f} [{interval['low']:.6f}, {interval['high']:.6f}]"
    tracker = start_run(config, f"{name} {entry.decision}", tags)
    tracker.metrics({0: _metrics(entry.details)})
    shown = {"decision": entry.decision, "reason": entry.reason, **dict(_roles(entry)), **entry.details}
    tracker.text(json.dumps(shown, indent=2) + "\n", "decision.json")
    tracker.end("FAILED" if entry.decision == "failed" else "FINISHED")
    return tracker.run_id


def of_version(config: Config, version: Version) -> None:
    """Write and tell the gate's decision on a version once; it is read from its tags, so a crash loses nothing."""
    tags, verdict = version.tags, version.verdict
    if not verdict or AGAINST not in tags or tags.get(RECORDED):
        return
    decision: What = "refused" if verdict.startswith("refused") else "promoted"
    reason = verdict.partition(": ")[2] or verdict
    reason += f"; {tags[CHANGED]}" if tags.get(CHANGED) else ""
    details = json.loads(tags.get(DETAILS, "{}"))
    entry = Entry(decision, reason, version.number, tags[AGAINST] or None, details)
    run_id = write_decision(config, entry)
    uri = resolve_uri(config)
    # Before the tag: a call that is killed here tells again, instead of never.
    notify.tell(config, entry.decision, entry.reason, entry.challenger, entry.champion)
    with reachable(uri):
        connect(uri).set_model_version_tag(version.name, version.number, RECORDED, run_id)


def moved(config: Config, now: ToBeat) -> None:
    """Write and tell, once, that the champion is not the one of the latest decision: a person has moved the alias."""
    last = _latest(config, {"olora.kind": "retraining", "olora.model": str(config.registry.model)}, but="failed")
    if last is None or now.version is None:
        return
    tags, number = last.data.tags, now.version.number
    role = "challenger" if tags.get("olora.decision") in ("promoted", "moved") else CHAMPION
    left = tags.get(f"olora.{role}", "").rpartition("/")[2]
    if left == number:
        return
    verdicts = {version.number: version.verdict for version in now.versions if version.rolled_back}
    by_gate = now.version.verdict.startswith(("passed", "refused")) or not now.version.verdict
    how = verdicts.get(left) or ("its alias was set or deleted in MLflow" if by_gate else now.version.verdict)
    before = f"version {left}" if left else "none"
    reason = f"the champion is version {number}, but the latest decision left {before}: {how}"
    notify.tell(config, "moved", reason, number, left or None)
    write_decision(config, Entry("moved", reason, number, left or None))


def unchanged(config: Config, entry: Entry) -> None:
    """Write that nothing has changed, unless the latest run says the same: a scheduler may call every minute."""
    last = _latest(config, {"olora.kind": "retraining", "olora.model": str(config.registry.model)})
    tags = last.data.tags if last is not None else {}
    if (tags.get("olora.decision"), tags.get("olora.reason")) != (entry.decision, entry.reason):
        write_decision(config, entry)


def _latest(config: Config, wanted: Mapping[str, str], but: str | None = None) -> Any:
    words = " and ".join(f"tags.`{tag}` = '{text}'" for tag, text in wanted.items())
    words += f" and tags.`olora.decision` != '{but}'" if but else ""
    with reachable(uri := resolve_uri(config)):
        client = connect(uri)
        experiment = client.get_experiment_by_name(config.tracking.experiment)
        if experiment is None:
            return None
        newest = ["attributes.start_time DESC"]
        runs = client.search_runs([experiment.experiment_id], words, max_results=1, order_by=newest)
        return runs[0] if runs else None


def _roles(entry: Entry) -> list[tuple[str, str | None]]:
    return [("challenger", entry.challenger), (CHAMPION, entry.champion)]


def _note(name: str, entry: Entry) -> str:
    links = [
        f"{role}: [{name} version {number}](#/models/{name}/versions/{number})"
        for role, number in _roles(entry)
        if number
    ]
    return "\n\n".join([f"**{entry.decision}**: {entry.reason}", *links])


def _metrics(details: Mapping[str, Any]) -> dict[str, float]:
    roles = {
        f"{role}/{metric}": float(value)
        for role in ("challenger", CHAMPION)
        for metric, value in (details.get(role) or {}).items()
    }
    return roles | {f"improvement/{bound}": float(value) for bound, value in (details.get("improvement") or {}).items()}
