"""The end of a retraining: the gate decides against the champion of now, and the aliases follow.

Deciding takes minutes, and meanwhile anybody may move the champion: a person, or a retraining from another storage.
The decision is carried out only if the champion is still the one it was made against; else it is made again.
"""

import json
import logging
from collections.abc import Callable

from olora_ray.common.errors import TryAgain
from olora_ray.retrain.changes import AGAINST
from olora_ray.retrain.decision_run import DETAILS, RECORDED
from olora_ray.retrain.gate import Decision
from olora_ray.retrain.recipe import continued_version
from olora_ray.retrain.to_beat import ToBeat, version_to_beat
from olora_ray.tracking import record
from olora_ray.tracking.aliases import Aliases, Overtaken, rolled_back
from olora_ray.tracking.version import Version

logger = logging.getLogger(__name__)

ATTEMPTS = 5
Decide = Callable[[Version, Version | None], Decision]
"""The gate's decision on a challenger against the version to beat; None if there is none."""


def settle(aliases: Aliases, number: str, decide: Decide, check: Callable[[], None]) -> None:
    """Decide on version `number` and let aliases and tags follow; `check` raises if this process must not do that.

    A person's decision on the version itself stands. Raises TryAgain if the champion moves each time.
    """
    for _ in range(ATTEMPTS):
        challenger, to_beat = aliases.version(number), version_to_beat(aliases)
        if by_hand := _decided_by_hand(challenger, to_beat.version):
            logger.info(by_hand)
            return
        against, decision = _decision(challenger, to_beat, decide)
        check()
        try:
            _apply(aliases, number, to_beat, against, decision)
            return
        except Overtaken as overtaken:
            logger.info(f"{overtaken}: the gate decides again")
    raise TryAgain(f"{aliases.name}: the champion was moved {ATTEMPTS} times while the gate decided; try again later")


def _decided_by_hand(challenger: Version, to_beat: Version | None) -> str | None:
    if to_beat is not None and to_beat.number == challenger.number:
        return f"version {challenger.number} was made the champion by hand meanwhile: nothing is left to decide"
    if rolled_back(challenger):
        return f"version {challenger.number} was rolled back by hand meanwhile: it stays back"
    return None


def _decision(challenger: Version, to_beat: ToBeat, decide: Decide) -> tuple[str, Decision]:
    """The version against which is decided ("" for none), and the decision."""
    against = to_beat.version.number if to_beat.version else ""
    parent = continued_version(challenger)
    back = {version.number for version in to_beat.versions if rolled_back(version)}
    if parent is not None and parent != against and parent in back:
        # Not against the champion of now: the next call trains one that continues that champion.
        why = f"it continues version {parent}, which was rolled back meanwhile; promote it by hand if it is good"
        return parent, Decision(False, why, {})
    return against, decide(challenger, to_beat.version)


def _apply(aliases: Aliases, number: str, to_beat: ToBeat, against: str, decision: Decision) -> None:
    tags = record.folded({AGAINST: against, DETAILS: json.dumps(decision.details), RECORDED: ""})
    now = to_beat.champion
    if not decision.passed:
        aliases.refuse(number, f"refused: {decision.reason}", tags, instead_of=now)
        logger.info(f"refused: {decision.reason}")
        logger.info(f"version {number} stays challenger, {f'version {now} the champion' if now else 'no champion'}")
        return
    old = aliases.promote(number, f"passed: {decision.reason}", tags, instead_of=now, beaten=against or None)
    logger.info(f"passed: {decision.reason}")
    before = f", version {old} is previous" if old else ""
    logger.info(f"version {number} is the champion of {aliases.name}{before}")
