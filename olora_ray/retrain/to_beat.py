"""The version that a challenger must beat: the champion, or a substitute if its alias or its version was deleted.

A clean-up job, or a person, may delete either in MLflow; SQL stores delete the aliases with a version. Judging the next
version as the first one would then let a worse model in. So a model that has had a champion never has a first version
again: the challenger must beat the last champion, else the newest version that passed, else `previous`. The deleted
alias is not restored: a person may want that no version has it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from olora_ray.common.errors import UserError
from olora_ray.retrain.changes import AGAINST
from olora_ray.tracking.aliases import CHAMPION, GATE, PREVIOUS, Aliases, rolled_back
from olora_ray.tracking.version import Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ToBeat:
    """The version that a challenger must beat, and the registry in which it was found."""

    version: Version | None
    """None: the model has never had a champion."""
    role: str
    """Of this version, for the log: the champion, or what it was."""
    champion: str
    """Version with the alias `champion`; empty if there is no such alias."""
    versions: Sequence[Version]
    """All versions of the model, the oldest first."""


def version_to_beat(aliases: Aliases) -> ToBeat:
    """Find the version that a challenger must beat; raises UserError if there was a champion and nothing is left."""
    last, named, versions = aliases.last_champion(), aliases.current(), aliases.versions()
    there, champion = {version.number: version for version in versions}, named.get(CHAMPION, "")
    if champion in there:
        return ToBeat(there[champion], "the champion", champion, versions)
    passed = [version for version in versions if _passed(version)]
    substitutes = {
        "the last champion": there.get(last or ""),
        "the newest that passed": next((version for version in reversed(passed) if not rolled_back(version)), None),
        "the champion before": there.get(named.get(PREVIOUS, "")),
    }
    deleted = last is not None and last not in there
    gone = f"the champion, version {last}, was deleted" if deleted else "the alias champion is missing"
    for role, version in substitutes.items():
        if version is not None and not rolled_back(version):
            logger.warning(
                f"registry: {aliases.name}: {gone}; a new version must beat version {version.number}, {role};"
                f" set a champion with: pipelines/registry.py promote {aliases.name} VERSION"
            )
            return ToBeat(version, role, champion, versions)
    if last or PREVIOUS in named or passed or any(version.tags.get(AGAINST) for version in versions):
        raise UserError(
            f"registry.model={aliases.name}: {gone}, and no other version that passed is left to compare with; set a"
            f" champion with: pipelines/registry.py promote {aliases.name} VERSION, or delete the registered model to"
            " begin anew"
        )
    return ToBeat(None, "no champion", champion, versions)


def _passed(version: Version) -> bool:
    """True if the version has been a champion, by its verdict: it passed, or a person promoted it."""
    return GATE in version.tags and not version.tags[GATE].startswith("refused")
