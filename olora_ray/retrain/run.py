"""Retraining, from a look at the data to the moved alias; safe to call at any time and as often as one likes.

    unchanged    data, base model and settings are those of the champion: nothing is done
    promoted     the new version has passed the gate and is the champion
    refused      it has not: it stays challenger, the reason is its tag
    failed       something went wrong that calling again does not mend

Each of the stages leaves something that the next call finds: the run's folder under the storage, the version in
the registry, the measured rows, the gate's verdict as a tag. So the next call resumes one that was cut off.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from olora_ray.common import lock, storage
from olora_ray.common.errors import StoreError, StoreUnavailable, TryAgain, UserError, of_the_machine
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import Fingerprint, RunFolder
from olora_ray.retrain import decision_run, gate, notify, recipe
from olora_ray.retrain.decision_run import DETAILS, RECORDED, Entry
from olora_ray.retrain.gate import Decision
from olora_ray.retrain.recipe import AGAINST, Inputs, continued_version, version_to_beat
from olora_ray.tracking import client, start
from olora_ray.tracking.aliases import GATE, Aliases, Overtaken, rolled_back
from olora_ray.tracking.checksums import Version
from olora_ray.tracking.start import resolve_uri

logger = logging.getLogger(__name__)

# The end of a retraining: the gate compares with the current champion, and the aliases follow.


Decide = Callable[[Version, Version | None], Decision]
"""The gate's decision on a challenger against the version to beat; None if there is none."""


def apply_decision(aliases: Aliases, number: str, decide: Decide, check: Callable[[], None]) -> None:
    """Decide on version `number` and let aliases and tags follow; `check` raises if this process must not do that.

    A person's decision on the version itself stands. Raises TryAgain if the champion moves each time.
    """
    for _ in range(5):
        challenger, to_beat = aliases.version(number), version_to_beat(aliases)
        if to_beat.version is not None and to_beat.version.number == number:
            logger.info(f"version {number} was made the champion by hand meanwhile: nothing is left to decide")
            return
        if rolled_back(challenger):
            logger.info(f"version {number} was rolled back by hand meanwhile: it stays back")
            return
        against = to_beat.version.number if to_beat.version else ""
        parent = continued_version(challenger)
        back = {version.number for version in to_beat.versions if rolled_back(version)}
        if parent is not None and parent != against and parent in back:
            # The current champion is another one: the next call trains a version that continues it.
            why = f"it continues version {parent}, which was rolled back meanwhile; promote it by hand if it is good"
            against, decision = parent, Decision(False, why, {})
        else:
            decision = decide(challenger, to_beat.version)
        check()
        try:
            _move_aliases(aliases, number, to_beat.champion, against, decision)
            return
        except Overtaken as overtaken:
            logger.info(f"{overtaken}: the gate decides again")
    raise TryAgain(f"{aliases.name}: the champion was moved 5 times while the gate decided; try again later")


def _move_aliases(aliases: Aliases, number: str, champion: str, against: str, decision: Decision) -> None:
    tags = {AGAINST: against, DETAILS: json.dumps(decision.details), RECORDED: ""}
    verdict = f"{'passed' if decision.passed else 'refused'}: {decision.reason}"
    if decision.passed:
        old = aliases.promote(number, verdict, tags, instead_of=champion, beaten=against or None)
        before = f", version {old} is previous" if old else ""
        after = f"version {number} is the champion of {aliases.name}{before}"
    else:
        aliases.refuse(number, verdict, tags, instead_of=champion)
        still = f"version {champion} the champion" if champion else "no champion"
        after = f"version {number} stays challenger, {still}"
    logger.info(verdict)
    logger.info(after)


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
    start.follow(config.run.storage)
    place = storage.join(config.run.storage, "locks", f"{name}.json")
    with lock.held(place, f"the retraining of {name}") as lease:
        try:
            return _retrain(config, Aliases(resolve_uri(config), name), lease)
        except Exception as error:
            if not isinstance(error, TryAgain | StoreUnavailable):
                with contextlib.suppress(Exception):  # what happened matters more than that it cannot be recorded
                    decision_run.write(config, Entry("failed", f"{type(error).__name__}: {error}"))
            raise


def _retrain(config: Config, aliases: Aliases, lease: lock.Lock) -> Entry | None:
    aliases.repair()
    inputs = None
    if (now := recipe.look_again(config)) is None:
        inputs = recipe.look(config)
        now = inputs.fingerprint
    to_beat = version_to_beat(aliases)
    if (done := recipe.find_decision(to_beat.versions, to_beat.version, now)) is not None:
        late = decision_run.of_version(config, done)  # the call that decided was cut off before it told
        which = to_beat.role if done is to_beat.version else done.tags[GATE]
        reason = f"nothing changed since version {done.number} of {done.name} ({which})"
        logger.info(reason)
        decision_run.unchanged(config, Entry("unchanged", reason, champion=to_beat.champion or None))
        return late
    inputs = inputs or recipe.look(config)
    config = inputs.config
    if to_beat.version is None:
        logger.info("no champion yet: training the first version")
    else:
        changed = ", ".join(inputs.fingerprint.changes(Fingerprint.from_tags(to_beat.version.tags)))
        logger.info(f"changed since {to_beat.role}, version {to_beat.version.number}: {changed}")
    version, learned = _trained(config, aliases, inputs, to_beat.version)

    def decide(challenger: Version, against: Version | None) -> Decision:
        return _decide(config, inputs, challenger, against) if learned else NOTHING_LEARNED

    apply_decision(aliases, version.number, decide, lease.check)  # whoever has taken over decides by himself
    return decision_run.of_version(config, aliases.version(version.number))


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
