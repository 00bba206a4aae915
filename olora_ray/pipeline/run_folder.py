"""Paths in a run's folder, `<storage>/<name>/`, and the checks that the folder is this run's to use.

A run is known by its settings and by the contents of its model and data: these may lie elsewhere when it is resumed.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from olora_ray.common import storage
from olora_ray.common.errors import StoreUnavailable, TryAgain, UserError, short_reason
from olora_ray.common.secrets import mask
from olora_ray.config.load import FREE_TO_CHANGE, LENGTH, build, dump, flatten, override, parse_yaml
from olora_ray.config.schema import Config
from olora_ray.tracking.checksums import SETTINGS

logger = logging.getLogger(__name__)

PLACES = re.compile(r"model\.(name|revision)|data\.(train|eval)\.\d+\.(path|only)|data\.chat_template|train\.start")
"""Fields that say where something lies: what counts is what lies there."""


def bound_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of flat settings that a run's folder is bound to: neither free to change, nor places."""
    bound = {
        field: value
        for field, value in settings.items()
        if not field.startswith(FREE_TO_CHANGE) and not PLACES.fullmatch(field)
    }
    return bound | {"train.start": "a checkpoint" if settings.get("train.start") else None}


def _all_but_length(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in bound_settings(settings).items() if field not in LENGTH}


def _length(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The field that says how long a run is: train.epochs counts where train.steps is not set."""
    field = "train.epochs" if settings["train.steps"] is None else "train.steps"
    return {field: settings[field]}


def where_now(folder: str, storage_root: str) -> str:
    """The run folder that was `folder` once: the one of that name in the storage if it has moved with it."""
    moved = storage.join(storage_root, folder.rstrip("/").rpartition("/")[2])
    return moved if folder and not storage.exists(folder) and storage.exists(moved) else folder


def _places(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in settings.items() if PLACES.fullmatch(field)}


def _delivery(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in settings.items() if field.startswith(("export.", "registry."))}


class RunFolder:
    """Places in a run's folder."""

    def __init__(self, config: Config, root: str | None = None) -> None:
        """`root` is the folder if it is another than the config's own: that of a trial of a search."""
        self.config = config
        self.root = root or config.folder()
        self.settings = storage.join(self.root, "config.yaml")
        self.checkpoints = storage.join(self.root, "checkpoints")
        self.adapter = storage.join(self.root, "export", "adapter")
        self.merged = storage.join(self.root, "export", "merged")
        self.parity = storage.join(self.root, "export", "parity.json")
        self.training = storage.join(self.root, "training.json")
        self.result = storage.join(self.root, "result.json")
        self._tracking = storage.join(self.root, "tracking.json")

    def check(self) -> None:
        """Check that the storage can be written, and that no training with other settings has this name.

        A training of another length may be continued. For `data.max_length: auto` the config gets the kept number.
        Raises UserError if not; TryAgain if an object store does not answer now. Leaves nothing behind.
        """
        storage.check(self.config.run.storage, "run.storage")
        try:
            problem = self._problem()
        except UnicodeDecodeError:
            raise UserError(f"{self.settings}: not UTF-8 text; put it back, or delete {self.root}") from None
        except OSError as error:
            kind = TryAgain if isinstance(error, StoreUnavailable) else UserError
            raise kind(f"run.storage: {self.root} cannot be read: {short_reason(error)}") from None
        if problem:
            raise UserError(f"{problem}; choose another run.name, or leave it out, or delete {self.root}")

    def _problem(self) -> str:
        """Why the config cannot be that of the training that has this name; empty if it can, or there is none."""
        from olora_ray.train import checkpoints  # with torch, as below: a night without changes is told without it

        there = checkpoints.names(self.checkpoints)
        if not there and self._result() is None:
            return ""
        if self.config.data.max_length == "auto" and storage.exists(self.settings):
            self.config = override(self.config, {"data.max_length": self._kept().data.max_length})
        run = f"{self.config.run.name!r}"
        if self._changes(_all_but_length):
            return f"run.name: {run} exists with other settings ({self.other_settings()})"
        if not (shown := self._changes(_length)):
            return ""
        if not there:
            return f"run.name: {run} has no checkpoint to continue from ({shown})"
        train, kept, done = self.config.train, self._kept().train, checkpoints.last_step(self.checkpoints)
        state = (_read_json(self.training) or {}).get("state")
        if train.early_stop and isinstance(state, dict) and state.get("stale", 0) >= train.early_stop:
            return f"train.early_stop: {run} has ended early, after step {done}: more steps are not trained ({shown})"
        # How many steps the epochs have is not known here.
        more_epochs = train.steps is None and kept.steps is None and train.epochs > kept.epochs
        if more_epochs or (train.steps or 0) >= done:
            return ""
        return f"train.steps: {run} has done {done} steps ({shown}): set train.steps={done} or more"

    def other_settings(self) -> str:
        """The settings that decide numbers and were others when the name was claimed, with both values."""
        return self._changes(bound_settings)

    def moved(self) -> str:
        """Where model and data were when the name was claimed, and are now; so they may be others. Empty if not."""
        return self._changes(_places)

    def delivered_otherwise(self) -> str:
        """The fields of exports and registry that were others when the name was claimed, with both values."""
        return self._changes(_delivery)

    def _changes(self, part: Callable[[Mapping[str, Any]], dict[str, Any]]) -> str:
        """The first fields of `part` that differ from the config that was kept, with both values."""
        if not storage.exists(self.settings):
            return ""
        old, new = part(flatten(self._kept())), part(flatten(self.config))
        changed = [field for field in sorted(old.keys() | new.keys()) if old.get(field) != new.get(field)]
        return ", ".join(f"{field} was {old.get(field)!r}, is {new.get(field)!r}" for field in changed[:4])

    def _kept(self) -> Config:
        return build(parse_yaml(storage.read_text(self.settings), self.settings), self.settings)

    def require_same(self, contents: Mapping[str, str]) -> None:
        """Raise UserError if the run was trained with other contents than these, by their names in its identity.

        Those that are not given are not looked at. Does nothing for a run that has neither checkpoint nor result.
        """
        from olora_ray.train import checkpoint

        found = self._identity()
        if any(found.get(what, digest) != digest for what, digest in contents.items()):
            where = f"{self.root} ({shown})" if (shown := self.moved()) else self.root
            checkpoint.require_same({**contents, **found}, contents, where)

    def claim(self) -> None:
        """Keep the config: from now on the name is this run's. If its length is another one, it has not ended."""
        if shown := self._changes(_length):
            from olora_ray.train import checkpoints

            if step := checkpoints.last_step(self.checkpoints):
                logger.info(
                    f"{shown}: training continues after step {step} with the optimizer's state; from there the learning"
                    " rate follows the schedule of the new length, so the result is that of a run which had this length"
                    " from its start only with train.schedule=constant and train.warmup=0"
                )
            # Before the config: with the new one they would be the results of a run that has not ended.
            storage.remove(self.training)
            storage.remove(self.result)
        storage.write_text(self.settings, dump(self.config))

    def finished(self) -> dict[str, Any] | None:
        """The result of a run of this length that ended well; None if there is none, or it is damaged."""
        found = self._result()
        return None if found is None or self._changes(_length) else found

    def _result(self) -> dict[str, Any] | None:
        found = _read_json(self.result)
        metrics = found.get("metrics", {}) if found else None
        whole = isinstance(metrics, dict) and all(isinstance(value, int | float | None) for value in metrics.values())
        return found if whole else None

    def exported(self, step: int) -> dict[str, Any] | None:
        """The parity report of exports that are complete and were made of the best adapter after `step` steps.

        None also for exports of another form than the config's: export.merged may have been changed since.
        """
        found = _read_json(self.parity)
        if not found or found.get("ok") is not True or found.get("step") != step:
            return None
        return found if found.pop("export", None) == self.config.export.model_dump() else None

    def write_parity(self, measured: dict[str, Any]) -> None:
        """Write export/parity.json, the last file of the exports."""
        content = {**measured, "export": self.config.export.model_dump()}
        storage.write_text(self.parity, json.dumps(content, indent=2) + "\n")

    def trained(self) -> str | None:
        """The text of training.json, if training of this length has ended. Raises OSError if it cannot be read now."""
        try:
            text = storage.read_text(self.training)
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return None if self._changes(_length) else text

    def write_training(self, text: str) -> None:
        """Keep what training gave, so that what comes after it can be repeated alone."""
        storage.write_text(self.training, text)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, the last file of a run."""
        storage.write_text(self.result, json.dumps(result, indent=2) + "\n")

    def drop_result(self) -> None:
        """Let the run be unfinished: the next call publishes and registers what it has made, and trains nothing."""
        storage.remove(self.result)

    def tracking_run(self, uri: str) -> str | None:
        """The id of this run in the MLflow at `uri`, if it was started there before."""
        kept = _read_json(self._tracking) or {}
        return str(kept["run_id"]) if kept.get("uri") == self._shown(uri) and kept.get("run_id") else None

    def keep_tracking_run(self, uri: str, run_id: str) -> None:
        """Remember the MLflow run, so that a later attempt continues with it; a password in `uri` is not kept."""
        storage.write_text(self._tracking, json.dumps({"uri": self._shown(uri), "run_id": run_id}))

    def _shown(self, uri: str) -> str:
        """Without a password; a database in the storage is named by its place there, which stays when that is moved."""
        return mask(uri).replace(f"sqlite:///{os.path.abspath(self.config.run.storage)}/", "sqlite:///<run.storage>/")

    def _identity(self) -> dict[str, str]:
        """Return the digests that the run was trained with, from its newest checkpoint or its result."""
        from olora_ray.train import checkpoint, checkpoints

        for name in reversed(checkpoints.names(self.checkpoints)):
            state = _read_json(storage.join(self.checkpoints, name, checkpoint.STATE)) or {}
            if isinstance(found := state.get("identity"), dict):
                return found
        done = self.finished() or {}
        base, data = done.get("base") or {}, done.get("data") or {}
        known = {
            "base model": base.get("digest"),
            "training data": data.get("train"),
            "held-out data": data.get("eval"),
        }
        return {what: str(digest) for what, digest in known.items() if digest is not None}


def _read_json(place: str) -> dict[str, Any] | None:
    """The object in a JSON file of our own; None if it is not there, or damaged: it is then made again.

    Raises OSError if it cannot be read now: a run that has ended would be trained, and registered, once more.
    """
    try:
        tree = json.loads(storage.read_text(place))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


# Fingerprint of a model: digests of the four things it was made of; equal ones would give the same model again.


NEUTRAL = frozenset({"activation_checkpointing", "keep", "log_every", "checkpoint_every", "start"})
"""Fields of the train section that do not change what comes out, or say where it started."""
MODEL = frozenset({"dtype", "attention", "quantization"})
"""Fields of the model section that change it, beside the model itself."""
TAGS = {
    "base": "olora.base_digest",
    "data": "olora.data_digest",
    "held_out": "olora.held_out_digest",
    "settings": SETTINGS,
}
WORDS = {"base": "base model", "data": "training data", "held_out": "held-out data", "settings": "settings"}


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a version's parts."""

    base: str
    data: str
    """Digest of contents, tokenizer and how rows become sequences: the name of the token store."""
    held_out: str
    """The same for the held-out rows; empty if there are none."""
    settings: str
    """See `settings_digest`."""

    def tags(self) -> dict[str, str]:
        """As tags of a registered version."""
        return {tag: getattr(self, name) for name, tag in TAGS.items()}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> "Fingerprint":
        """Return the fingerprint of a version; empty where it lacks a tag, so that it equals no other."""
        return cls(**{name: tags.get(tag, "") for name, tag in TAGS.items()})

    def changes(self, before: "Fingerprint") -> list[str]:
        """Words for what is different."""
        return [word for name, word in WORDS.items() if getattr(self, name) != getattr(before, name)]


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
