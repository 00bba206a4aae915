"""Retraining, from a look at the data to the moved alias. It may be called at any time and any number of times.

    unchanged    the champion has the same data, base model and settings: nothing is done
    promoted     the new version has passed the gate and is the champion
    refused      the new version has not passed: it stays challenger, the reason is its tag
    failed       an error that another call does not fix

Each stage leaves something that the next call uses: the run folder in the storage, the version in the registry, the
measured rows, the gate's verdict as a tag. So the next call resumes an interrupted one.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from olora_ray.common import lock, storage
from olora_ray.common.errors import (
    StoreError,
    StoreUnavailable,
    TryAgain,
    UserError,
    of_the_machine,
)
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.retrain import decision_run, notify, recipe
from olora_ray.retrain.decision_run import DETAILS, RECORDED, Entry
from olora_ray.retrain.gate import LOOKS, Decision
from olora_ray.retrain.recipe import SHRUNK, Inputs, continued_version, shrunk_to, version_to_beat
from olora_ray.tracking import client, models, old_versions
from olora_ray.tracking.aliases import CHAMPION, Aliases, Overtaken
from olora_ray.tracking.checksums import AGAINST, JUDGED, Version
from olora_ray.tracking.start import resolve_uri

logger = logging.getLogger(__name__)

# The end of a retraining: the gate compares with the current champion, then the aliases are moved.

# The gate's decision on a challenger against the version to beat (None if there is none).
Decide = Callable[[Version, Version | None], Decision]


def apply_decision(
    aliases: Aliases, number: str, decide: Decide, check: Callable[[], None]
) -> None:
    """Decide on version `number`, then set aliases and tags; `check` raises if another process has taken over.

    A decision by hand on this version is kept. Raises TryAgain if the champion is moved during every attempt.
    """
    for _ in range(5):
        challenger = aliases.version(number)
        to_beat = version_to_beat(aliases)
        if to_beat.version is not None and to_beat.version.number == number:
            logger.info(
                f"version {number} was promoted by hand meanwhile: nothing is left to decide"
            )
            return
        if challenger.rolled_back:
            logger.info(f"version {number} was rolled back by hand meanwhile: it stays rolled back")
            return
        against = to_beat.version.number if to_beat.version else ""
        parent = continued_version(challenger)
        back = {version.number for version in to_beat.versions if version.rolled_back}
        if parent is not None and parent != against and parent in back:
            # The champion has changed: the next call trains a version that continues the current champion.
            why = f"it continues version {parent}, which was rolled back meanwhile; promote it by hand if it is good"
            against = parent
            decision = Decision(False, why, {})
        else:
            decision = decide(challenger, to_beat.version)
        check()
        try:
            _move_aliases(aliases, challenger, to_beat.champion, against, decision)
            return
        except Overtaken as overtaken:
            logger.info(f"{overtaken}: the gate decides again")
    raise TryAgain(
        f"{aliases.name}: the champion was moved 5 times while the gate decided; try again later"
    )


def _move_aliases(
    aliases: Aliases, challenger: Version, champion: str, against: str, decision: Decision
) -> None:
    number = challenger.number
    tags = {AGAINST: against, DETAILS: json.dumps(decision.details), RECORDED: "", SHRUNK: ""}
    tags |= {**decision.tags, JUDGED: challenger.checksum}
    if decision.passed:
        verdict = f"passed: {decision.reason}"
        old = aliases.promote(number, verdict, tags, instead_of=champion, beaten=against or None)
        after = f"version {number} is the champion of {aliases.name}"
        if old:
            after += f", version {old} is previous"
        for line in models.uses(aliases.uri, f"models:/{aliases.name}@{CHAMPION}"):
            logger.info(line)
    else:
        verdict = f"refused: {decision.reason}"
        aliases.refuse(number, verdict, tags, instead_of=champion)
        still = f"version {champion} the champion" if champion else "no champion"
        after = f"version {number} stays challenger, {still}"
    logger.info(verdict)
    logger.info(after)


NOTHING_LEARNED = Decision(
    False,
    "no step on the new rows lowered the held-out loss, so this is the champion's adapter again",
    {},
)


def run(config: Config) -> Entry:
    """Retrain the config's registered model if there is a reason, and send the result to the config's notify section.

    Return the decision.
    Raises UserError for problems that the user can fix, TryAgain if another retraining of the model runs or MLflow does
    not answer, and Stopped after a signal; deploy/night.py sends the notification of these two.
    """
    try:
        entry = _locked(config)
        # The hub's readers load the repository as they load @champion, so it also follows a promotion or rollback by
        # hand.
        aliases = Aliases.of(config)
        if config.export.push is not None:
            number = aliases.current().get(CHAMPION)
            if number is not None:
                from olora_ray.pipeline import publish

                publish.push_version(config, number)
        decision_run.good_night(config, aliases)
    except Exception as error:
        if not isinstance(error, TryAgain | StoreUnavailable):
            reason = of_the_machine(error) or f"{type(error).__name__}: {error}"
            if isinstance(error, UserError | StoreError):
                reason = str(error)
            notify.tell(config, "failed", reason)
        raise
    return entry


def lock_of(config: Config) -> str:
    """Return the path of the lock of a model's retraining; raise UserError if the config names no model."""
    name = config.registry.model
    if name is None:
        raise UserError("registry.model: not set; retraining needs the name of a registered model")
    client.check_uri(resolve_uri(config))
    return storage.join(config.run.storage, "locks", f"{name}.json")


def _locked(config: Config) -> Entry:
    path = lock_of(config)
    with lock.held(path, f"the retraining of {config.registry.model}") as lease:
        try:
            return _retrain(config, Aliases.of(config), lease)
        except Exception as error:
            if not isinstance(error, TryAgain | StoreUnavailable):
                entry = Entry("failed", f"{type(error).__name__}: {error}")
                # The error itself matters more than a failure to record it.
                with contextlib.suppress(Exception):
                    decision_run.write_decision(config, entry)
            raise


def _retrain(config: Config, aliases: Aliases, lease: lock.Lock) -> Entry:
    aliases.repair()
    inputs = None
    now = recipe.cached_fingerprint(config)
    if now is None:
        inputs = recipe.read_inputs(config)
        now = inputs.fingerprint
    to_beat = version_to_beat(aliases)
    # A call that decided may have been killed before it wrote and told the decision.
    for version in to_beat.versions:
        decision_run.of_version(config, version)
        decision_run.changed(config, aliases, version)
    decision_run.moved(config, to_beat)
    if to_beat.version is not None:
        to_beat.version.refuse_changed()
    done = recipe.find_decision(to_beat.versions, to_beat.version, now)
    if done is not None:
        which = to_beat.role if done is to_beat.version else done.verdict
        reason = f"nothing changed since version {done.number} of {done.name} ({which})"
        logger.info(reason)
        champion = to_beat.version.number if to_beat.version else None
        entry = Entry("unchanged", reason, champion=champion)
        decision_run.unchanged(config, entry)
        return entry
    inputs = inputs or recipe.read_inputs(config)
    config = inputs.config
    recipe.note(config, inputs.plan)
    if to_beat.version is None:
        logger.info("no champion yet: training the first version")
    else:
        changes = recipe.changed(inputs, to_beat.version)
        logger.info(f"changed since {to_beat.role}, version {to_beat.version.number}: {changes}")
    from olora_ray.retrain import compare, shrink  # Ray, which a call without changes does not need

    # Before the training, so that a mistake in gate.guard costs nothing.
    guard = compare.guard(config, inputs)
    wanted, about = recipe.training_config(config, inputs, to_beat.version)
    version, learned = _trained(wanted, about, aliases, inputs)

    def judged(challenger: Version, against: Version | None, looks: int = 1) -> Decision:
        gone = old_versions.pruned(aliases)
        versions = aliases.versions()
        return compare.decision(inputs, guard, challenger, against, versions, gone, looks)

    def decide(challenger: Version, against: Version | None) -> Decision:
        if not learned:
            return NOTHING_LEARNED
        decision = judged(challenger, against)
        if not (decision.harms and config.gate.shrink):
            return decision
        of_part = partial(judged, against=against, looks=LOOKS)
        return shrink.tried(decision, challenger, wanted, inputs, of_part)

    # If another process has taken the lock, that process decides.
    apply_decision(aliases, version.number, decide, lease.check)
    decided = aliases.version(version.number)
    part = shrunk_to(decided)
    if part is not None:

        def decide_part(challenger: Version, against: Version | None) -> Decision:
            decision = judged(challenger, against, LOOKS)
            return replace(decision, reason=f"shrunk to {part:g}: {decision.reason}")

        version, _ = _trained(shrink.prepare(wanted, part), about, aliases, inputs)
        apply_decision(aliases, version.number, decide_part, lease.check)
        decided = aliases.version(version.number)
    decision_run.of_version(config, decided)
    return decision_run.entry_of(decided)


def _trained(
    wanted: Config, tags: Mapping[str, str], aliases: Aliases, inputs: Inputs
) -> tuple[Version, bool]:
    """Train, export and register, or resume that. Return the version, and False if training improved nothing."""
    # Imported here, because it imports Ray, which a call without changes does not need.
    from olora_ray.pipeline import run as pipeline

    folder = RunFolder(wanted.folder())
    done = folder.state().finished(wanted)
    if done and _version_of(aliases, done) is None:
        logger.info(
            f"the finished run {done.get('run')} has no version in this registry: it is registered again"
        )
        folder.drop_result()
    result = pipeline.run(wanted, tags, inputs.base)
    # The best adapter is exported. If no step was better, that is the champion's adapter, from which it started.
    learned = wanted.train.start is None or result["best_step"] > 0
    version = _version_of(aliases, result)
    assert version is not None
    return version, learned


def _version_of(aliases: Aliases, result: Mapping[str, Any]) -> Version | None:
    # Not by its number in result.json: after a change of tracking.uri or registry.model, that number may belong to
    # another model.
    run_id = (result.get("mlflow") or {}).get("run_id")
    if not run_id:
        return None
    return aliases.of_run(str(run_id))
