"""What somebody can do who may write a model's files, tags and aliases in MLflow, but has no signing key of ours.

It goes through MLflow's client alone, so it works on any MLflow. Version `good` was judged, signed and made the
champion; version `other` was signed alone.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olora_ray.common.storage import digest_bytes
from olora_ray.tracking.aliases import CHAMPION, Aliases
from olora_ray.tracking.checksums import FILE, GATE, JUDGED, SIGNATURE, TAG

WEIGHTS = "peft/adapter_model.safetensors"
CONFIG = "peft/adapter_config.json"
ADDED = "peft/added_tokens.json"


@dataclass(frozen=True)
class Forger:
    aliases: Aliases
    good: str
    other: str
    key: Path
    """A private key of theirs."""

    def files(self, number: str) -> Any:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        place = self.aliases.files_uri(number)
        return get_artifact_repository(place, tracking_uri=self.aliases.uri)

    def read(self, number: str, file: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.files(number).download_artifacts(file, folder)).read_bytes()

    def write(self, file: str, content: bytes) -> None:
        inner, _, name = file.rpartition("/")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, name).write_bytes(content)
            self.files(self.good).log_artifact(f"{folder}/{name}", inner or None)

    def change(self, file: str, *tags: str) -> None:
        """Change the last byte of a file; with tags, also write checksums that fit, and their digest into the tags."""
        content = self.read(self.good, file)
        content = content[:-1] + bytes([content[-1] ^ 1])
        self.write(file, content)
        if tags:
            listed = json.loads(self.read(self.good, FILE))
            listed["files"][file]["sha256"] = digest_bytes(content)
            text = json.dumps(listed).encode()
            self.write(FILE, text)
            for tag in tags:
                self.aliases.tag_version(self.good, tag, digest_bytes(text))

    def swap(self, *files: str) -> None:
        for file in files:
            self.write(file, self.read(self.other, file))


def config(by: Forger) -> None:
    by.change(CONFIG)


def removed(by: Forger) -> None:
    by.files(by.good).delete_artifacts(CONFIG)


def added(by: Forger) -> None:
    by.write(ADDED, b"{}")


def rewritten(by: Forger) -> None:
    by.change(WEIGHTS, TAG)


def swapped(by: Forger) -> None:
    by.swap(*json.loads(by.read(by.other, FILE))["files"], FILE, SIGNATURE)
    by.aliases.tag_version(by.good, TAG, by.aliases.version(by.other).checksum)


def unlisted(by: Forger) -> None:
    by.aliases.client.delete_model_version_tag(by.aliases.name, by.good, TAG)


def alias(by: Forger) -> None:
    by.aliases.client.set_registered_model_alias(by.aliases.name, CHAMPION, by.other)


def verdict(by: Forger) -> None:
    tags = by.aliases.version(by.good).tags
    for tag in (GATE, JUDGED):
        by.aliases.tag_version(by.other, tag, tags[tag])
    alias(by)


def another_key(by: Forger) -> None:
    by.change(WEIGHTS, TAG, JUDGED)
    by.aliases.sign(by.good, str(by.key))


def another_signature(by: Forger) -> None:
    by.change(WEIGHTS, TAG, JUDGED)
    by.swap(SIGNATURE)


def unsigned(by: Forger) -> None:
    by.change(WEIGHTS, TAG, JUDGED)
    by.files(by.good).delete_artifacts(SIGNATURE)


TOLD: dict[Callable[[Forger], None], str] = {
    config: f"{CONFIG} was changed after the registration",
    removed: f"{CONFIG} is missing",
    added: f"{ADDED} was added after the registration",
    rewritten: "was changed after its verdict",
    swapped: "was changed after its verdict",
    unlisted: "was changed after its verdict",
    verdict: "was changed after its verdict",
    alias: "was not judged good",
    another_key: "the signature is not valid",
    another_signature: "the signature is not valid",
    unsigned: f"{SIGNATURE} is missing",
}
"""What the log says of each forgery."""
ONLY_BY_KEY = (another_key, another_signature, unsigned)
"""Forgeries that only a public key (registry.verify) tells from the good version."""
