"""Search for changes since the champion was made, by digests of contents and without Ray."""

from collections.abc import Sequence
from dataclasses import dataclass

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.pipeline.base import Base, open_base
from olora_ray.pipeline.fingerprint import Fingerprint, settings_digest
from olora_ray.tokens import prepare
from olora_ray.tokens.plan import Plan
from olora_ray.tracking.aliases import GATE, rolled_back
from olora_ray.tracking.version import Version

AGAINST = "olora.gate_against"
"""Tag of a version: the version that it had to beat when the gate decided; empty if there was none."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a retraining, as they are now."""

    base: Base
    plan: Plan
    """Of the training data."""
    held_out: Plan
    """Of the held-out rows."""
    fingerprint: Fingerprint


def look(config: Config) -> Inputs:
    """Read base model and data as far as their digests need it; files that were scanned before are not read again.

    Raises UserError for what training would refuse: missing files, a model that is none, nothing held out.
    """
    if not config.data.holds_out():
        raise UserError("data.eval: retraining compares with the champion on held-out rows; set it, or eval_fraction")
    base, seen = open_base(config), prepare.look_here(config)
    plan = prepare.plan_here(config, base.spec, "train", seen)
    held_out = prepare.plan_here(config, base.spec, "eval", seen)
    made_of = Fingerprint(base.model.digest, plan.digest(), held_out.digest(), settings_digest(config))
    return Inputs(base, plan, held_out, made_of)


def find_decision(versions: Sequence[Version], champion: Version | None, now: Fingerprint) -> Version | None:
    """The version that makes another training of the same useless.

    That is the champion, or its substitute, if it was made of the same; else a version made of the same that was rolled
    back, or that was judged against this champion. If it was judged against another one, the gate decides again.
    """
    if champion is not None and not now.changes(Fingerprint.from_tags(champion.tags)):
        return champion
    against = champion.number if champion is not None else ""
    for version in reversed(versions):
        if GATE not in version.tags or now.changes(Fingerprint.from_tags(version.tags)):
            continue
        if rolled_back(version) or version.tags.get(AGAINST) == against:
            return version
    return None
