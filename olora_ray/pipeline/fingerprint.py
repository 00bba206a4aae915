"""Fingerprint of a model: digests of the four things it was made of; equal ones would give the same model again."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields

from olora_ray.config.schema import Config
from olora_ray.model import identity

NEUTRAL = frozenset({"activation_checkpointing", "keep", "log_every", "checkpoint_every", "start"})
"""Fields of the train section that do not change what comes out, or say where it started."""
MODEL = frozenset({"dtype", "attention", "quantization"})
"""Fields of the model section that change it, beside the model itself."""
TAGS = {
    "base": "olora.base_digest",
    "data": "olora.data_digest",
    "held_out": "olora.held_out_digest",
    "settings": "olora.settings_digest",
}
WORDS = {"base": "base model", "data": "training data", "held_out": "held-out data", "settings": "settings"}


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a version's parts."""

    base: str
    data: str
    """Of contents, tokenizer and how rows become sequences: the name of the token store."""
    held_out: str
    """The same for the held-out rows; empty if there are none."""
    settings: str
    """See `settings_digest`."""

    def tags(self) -> dict[str, str]:
        """As tags of a registered version."""
        return {tag: getattr(self, name) for name, tag in TAGS.items()}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> "Fingerprint":
        """Of a version; empty where it lacks a tag, so that it equals no other."""
        return cls(**{name: tags.get(tag, "") for name, tag in TAGS.items()})

    def changes(self, before: "Fingerprint") -> list[str]:
        """Words for what is different."""
        different = {item.name for item in fields(self) if getattr(self, item.name) != getattr(before, item.name)}
        if identity.same(before.base, self.base):
            different.discard("base")
        return [WORDS[item.name] for item in fields(self) if item.name in different]


def settings_digest(config: Config) -> str:
    """Digest of the settings that decide what comes out: seed, precisions, attention, adapter, train and export.rank.

    Paths and names are not in it (contents are, in the other digests), nor what is left at its default: a new
    release with a new field does not change it.
    """
    sections = {
        "adapter": config.adapter.model_dump(mode="json", exclude_defaults=True),
        "train": config.train.model_dump(mode="json", exclude_defaults=True, exclude=set(NEUTRAL)),
        "model": config.model.model_dump(mode="json", exclude_defaults=True, include=set(MODEL)),
        "seed": config.run.seed,
    }
    if config.export.rank is not None:  # a compressed adapter computes something else; a merged one does not
        sections["export"] = {"rank": config.export.rank}
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:32]
