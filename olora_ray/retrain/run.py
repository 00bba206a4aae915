"""Retraining, from a look at the data to the moved alias; safe to call at any time and as often as one likes.

    unchanged    data, base model and settings are those of the champion: nothing is done
    promoted     the new version has passed the gate and is the champion
    refused      it has not: it stays challenger, the reason is its tag
    failed       something went wrong that calling again does not mend

Each of the stages leaves something that the next call finds: the run's folder under the storage, the version in
the registry, the measured rows, the gate's verdict as a tag. So the next call resumes one that was cut off.
"""

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from olora_ray.common import lock, storage
from olora_ray.common.errors import StoreError, StoreUnavailable, TryAgain, UserError, of_the_machine
from olora_ray.config.schema import Config
from olora_ray.pipeline.fingerprint import Fingerprint
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.retrain import changes, decision_run, gate, notify, recipe
from olora_ray.retrain.changes import Inputs
from olora_ray.retrain.decision_run import Entry
from olora_ray.retrain.gate import Decision
from olora_ray.retrain.settle import settle
from olora_ray.retrain.to_beat import ToBeat, version_to_beat
from olora_ray.tracking import client, moved_storage
from olora_ray.tracking.aliases import GATE, Aliases
from olora_ray.tracking.start import resolve_uri
from olora_ray.tracking.version import Version

logger = logging.getLogger(__name__)

NOTHING_LEARNED = Decision(
    False, "no step on the new rows made the held-out loss better, so this is the champion's adapter again", {}
)


def run(config: Config) -> None:
    """Retrain the config's registered model if there is a reason to, and tell the config's notify section how it ended.

    Raises UserError for what the user can fix, TryAgain if another retraining of the model is running or
    MLflow does not answer, and Stopped after a signal: of these two deploy/night.py tells.
    """
    try:
        decided = _locked(config)
    except (TryAgain, StoreUnavailable):
        raise
    except Exception as error:
        notify.tell(config, "failed", _reason(error))
        raise
    if decided is not None:
        notify.tell(config, decided.decision, decided.reason, decided.challenger, decided.champion)


def _reason(error: Exception) -> str:
    """The message of the last line that the command prints."""
    if isinstance(error, UserError | StoreError):
        return str(error)
    return of_the_machine(error) or f"{type(error).__name__}: {error}"


def _locked(config: Config) -> Entry | None:
    """Retrain under the model's lock; returns the decision on a version, if this call has recorded one."""
    name = config.registry.model
    if name is None:
        raise UserError("registry.model: retraining compares with a registered model; set its name")
    client.check(resolve_uri(config))
    moved_storage.follow(config)
    place = storage.join(config.run.storage, "locks", f"{name}.json")
    with lock.held(place, f"the retraining of {name}", config.retrain.wait, "set retrain.wait") as lease:
        try:
            return _retrain(config, Aliases(resolve_uri(config), name), lease)
        except Exception as error:
            if not isinstance(error, TryAgain | StoreUnavailable):
                with contextlib.suppress(Exception):  # what happened matters more than that it cannot be recorded
                    decision_run.write(config, Entry("failed", f"{type(error).__name__}: {error}"))
            raise


def _retrain(config: Config, aliases: Aliases, lease: lock.Lock) -> Entry | None:
    aliases.repair()
    inputs = changes.look(config)
    to_beat = version_to_beat(aliases)
    if (done := changes.find_decision(to_beat.versions, to_beat.version, inputs.fingerprint)) is not None:
        late = decision_run.of_version(config, done)  # the call that decided was cut off before it told
        _unchanged(config, done, to_beat)
        return late
    logger.info(_what_changed(inputs, to_beat))
    version, learned = _trained(config, aliases, inputs, to_beat.version)

    def decide(challenger: Version, against: Version | None) -> Decision:
        return _decide(config, inputs, challenger, against) if learned else NOTHING_LEARNED

    settle(aliases, version.number, decide, lease.check)  # whoever has taken over decides by himself
    return decision_run.of_version(config, aliases.version(version.number))


def _unchanged(config: Config, done: Version, to_beat: ToBeat) -> None:
    which = to_beat.role if done is to_beat.version else done.tags[GATE]
    reason = f"nothing changed since version {done.number} of {done.name} ({which})"
    logger.info(reason)
    decision_run.unchanged(config, Entry("unchanged", reason, champion=to_beat.champion or None))


def _what_changed(inputs: Inputs, to_beat: ToBeat) -> str:
    if to_beat.version is None:
        return "no champion yet: training the first version"
    changed = inputs.fingerprint.changes(Fingerprint.from_tags(to_beat.version.tags))
    return f"changed since {to_beat.role}, version {to_beat.version.number}: {', '.join(changed)}"


def _trained(config: Config, aliases: Aliases, inputs: Inputs, champion: Version | None) -> tuple[Version, bool]:
    """Train, export and register, or resume what an earlier call has begun of that.

    Returns the version, and whether it is another model than the one that training started with: the best
    adapter is exported, and that is the champion's if no step was better.
    """
    from olora_ray.pipeline import run as pipeline  # with Ray, which a call that finds nothing changed does not need

    wanted = recipe.make(config, inputs, champion)
    folder = RunFolder(wanted.config)
    if (done := folder.finished()) and _version_of(aliases, done) is None:
        logger.info(f"the version of the finished run {done.get('run')} is not in this registry: it is registered anew")
        folder.drop_result()
    result = pipeline.run(wanted.config, wanted.tags)
    learned = wanted.config.train.start is None or result["best_step"] > 0
    version = _version_of(aliases, result)
    assert version is not None
    return version, learned


def _version_of(aliases: Aliases, result: Mapping[str, Any]) -> Version | None:
    """The version of a finished run in the registry of now.

    Not by its number in result.json: tracking.uri or registry.model may have been changed since, and that number be
    another model's.
    """
    run_id = (result.get("mlflow") or {}).get("run_id")
    return aliases.of_run(str(run_id)) if run_id else None


def _decide(config: Config, inputs: Inputs, challenger: Version, champion: Version | None) -> Decision:
    from olora_ray.retrain import compare

    try:
        ours, *theirs = compare.measured(config, inputs, [challenger, *([champion] if champion else [])])
    except compare.NotComparable as error:
        return Decision(False, f"{error}; promote it by hand if it is good", {})
    about = compare.about_rows(config, inputs, ours, champion)
    return gate.decide(config.gate, ours, theirs[0] if theirs else None, about)
