"""The run folder `<storage>/<name>/`: its paths, and the checks that it belongs to this run.

A run is identified by its settings and by the contents of its model and data. Their paths may change between attempts.
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
"""Fields with paths and names of contents; a resumed run compares the contents instead."""


def bound_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change in a run folder: neither free to change nor paths of contents."""
    bound = {
        field: value
        for field, value in settings.items()
        if not field.startswith(FREE_TO_CHANGE) and not PLACES.fullmatch(field)
    }
    return bound | {"train.start": "a checkpoint" if settings.get("train.start") else None}


def _all_but_length(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in bound_settings(settings).items() if field not in LENGTH}


def _all_but_evaluation(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in _all_but_length(settings).items() if not field.startswith("evaluation.")}


def _length(settings: Mapping[str, Any]) -> dict[str, Any]:
    field = "train.epochs" if settings["train.steps"] is None else "train.steps"
    return {field: settings[field]}


def where_now(folder: str, storage_root: str) -> str:
    """Return `folder`, or the folder of the same name in `storage_root` if the whole storage was moved."""
    moved = storage.join(storage_root, folder.rstrip("/").rpartition("/")[2])
    return moved if folder and not storage.exists(folder) and storage.exists(moved) else folder


def _places(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in settings.items() if PLACES.fullmatch(field)}


def _delivery(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {field: value for field, value in settings.items() if field.startswith(("export.", "registry."))}
    kept.pop("export.push", None)  # `publish.push` needs no new export, and sees by itself whether it is done
    return kept


class RunFolder:
    def __init__(self, config: Config, root: str | None = None) -> None:
        """Use `root` instead of the config's own folder, for a trial of a search."""
        self.config = config
        self.root = root or config.folder()
        self.settings = storage.join(self.root, "config.yaml")
        self.checkpoints = storage.join(self.root, "checkpoints")
        self.adapter = storage.join(self.root, "export", "adapter")
        self.merged = storage.join(self.root, "export", "merged")
        self.gguf = storage.join(self.root, "export", "gguf")
        self.parity = storage.join(self.root, "export", "parity.json")
        self.training = storage.join(self.root, "training.json")
        self.result = storage.join(self.root, "result.json")
        self._tracking = storage.join(self.root, "tracking.json")

    def check(self) -> None:
        """Check that the storage is writable and that no run with other settings has this name; write nothing.

        Another length is allowed. For `data.max_length: auto` the config gets the number of the existing run. Raises
        UserError if a check fails, and TryAgain if an object store does not answer.
        """
        storage.check(self.config.run.storage, "run.storage")
        try:
            problem = self._problem()
        except UnicodeDecodeError:
            raise UserError(f"{self.settings}: not UTF-8 text; restore the file, or delete {self.root}") from None
        except OSError as error:
            error_type = TryAgain if isinstance(error, StoreUnavailable) else UserError
            raise error_type(f"run.storage: {self.root} cannot be read: {short_reason(error)}") from None
        if problem:
            raise UserError(f"{problem}; set another run.name, remove run.name, or delete {self.root}")

    def _problem(self) -> str:
        """Return why the config cannot resume the run with this name; empty if it can, or if there is no run."""
        from olora_ray.train import checkpoints  # imports torch, which a retraining without changes does not need

        checkpoint_names = checkpoints.names(self.checkpoints)
        if not checkpoint_names and self._result() is None:
            return ""
        if self.config.data.max_length == "auto" and storage.exists(self.settings):
            self.config = override(self.config, {"data.max_length": self._kept().data.max_length})
        run = f"{self.config.run.name!r}"
        if self._changes(_all_but_length):
            problem = f"run.name: {run} exists with other settings ({self.other_settings()})"
            if self._result() is not None and not self._changes(_all_but_evaluation):
                problem += f"; to evaluate its model so, run olora-ray evaluate {self.root} evaluation.FIELD=VALUE"
            return problem
        if not (shown := self._changes(_length)):
            return ""
        if not checkpoint_names:
            return f"run.name: {run} has another length ({shown}), but no checkpoint to resume from"
        train, kept, done = self.config.train, self._kept().train, checkpoints.last_step(self.checkpoints)
        state = (_read_json(self.training) or {}).get("state")
        if train.early_stop and isinstance(state, dict) and state.get("stale", 0) >= train.early_stop:
            return f"train.early_stop: {run} has stopped early, after step {done}, and is not trained longer ({shown})"
        # The number of steps of an epoch is not known here. A run that was cut short by train.steps may continue in
        # epochs; the workers refuse it if these have fewer steps than are done.
        more_epochs = train.steps is None and (kept.steps is not None or train.epochs > kept.epochs)
        if more_epochs or (train.steps or 0) >= done:
            return ""
        return f"train.steps: {run} has already done {done} steps ({shown}); set train.steps={done} or more"

    def other_settings(self) -> str:
        """Return the changed settings that affect the result, with both values."""
        return self._changes(bound_settings)

    def moved(self) -> str:
        """Return the changed paths of model and data, with both values; empty if there are none."""
        return self._changes(_places)

    def delivered_otherwise(self) -> str:
        """Return the changed settings of export and registry, with both values."""
        return self._changes(_delivery)

    def _changes(self, part: Callable[[Mapping[str, Any]], dict[str, Any]]) -> str:
        """Return up to four fields of `part` that differ from the config in the run folder, with both values."""
        if not storage.exists(self.settings):
            return ""
        old, new = part(flatten(self._kept())), part(flatten(self.config))
        changed = [field for field in sorted(old.keys() | new.keys()) if old.get(field) != new.get(field)]
        return ", ".join(f"{field} was {old.get(field)!r}, is {new.get(field)!r}" for field in changed[:4])

    def _kept(self) -> Config:
        try:
            return build(parse_yaml(storage.read_text(self.settings), self.settings), "config.yaml")
        except UserError as error:  # never "delete these fields": the numbers of the run may depend on them
            raise UserError(
                f"{self.root} was written by another version of olora_ray, or its config.yaml was changed"
                f" ({str(error)[:200]}); set another run.name, or delete the folder"
            ) from None

    def require_same(self, contents: Mapping[str, str]) -> None:
        """Raise UserError if the run was trained with other contents; `contents` has digests by their names.

        Only the digests in `contents` are compared. A run without checkpoint and result passes.
        """
        from olora_ray.train import checkpoint

        identity = self._identity()
        if any(identity.get(name, digest) != digest for name, digest in contents.items()):
            location = f"{self.root} ({shown})" if (shown := self.moved()) else self.root
            checkpoint.require_same({**contents, **identity}, contents, location)

    def claim(self) -> None:
        """Write config.yaml, which claims the name for this run; after a change of length, delete the old results."""
        if shown := self._changes(_length):
            from olora_ray.train import checkpoints

            if step := checkpoints.last_step(self.checkpoints):
                logger.info(
                    f"{shown}: training continues after step {step} with the optimizer's state and the schedule of the"
                    " new length; the result equals a run with this length from the start only with"
                    " train.schedule=constant and train.warmup=0"
                )
            # Delete the results before the config is written. If the driver dies in between, old results beside the new
            # config would look like the results of the longer run.
            storage.remove(self.training)
            if result := self._result():  # `olora-ray runs` shows it until the longer run ends
                storage.write_text(storage.join(self.root, "earlier.json"), json.dumps(result))
            storage.remove(self.result)
        storage.write_text(self.settings, dump(self.config))

    def finished(self) -> dict[str, Any] | None:
        """Return the result of a finished run of this length; None if it is missing or damaged."""
        result = self._result()
        return None if result is None or self._changes(_length) else result

    def _result(self) -> dict[str, Any] | None:
        result = _read_json(self.result)
        metrics = result.get("metrics", {}) if result else None
        whole = isinstance(metrics, dict) and all(isinstance(value, int | float | None) for value in metrics.values())
        return result if whole else None

    def exported(self, step: int) -> dict[str, Any] | None:
        """Return the parity report of complete exports of the best adapter after `step` steps.

        None if there are none, or if the export settings have changed since.
        """
        report = _read_json(self.parity)
        if not report or report.get("ok") is not True or report.get("step") != step:
            return None
        # A change of export.merged, export.rank or export.gguf since then needs other exports.
        return report if report.pop("export", None) == self.config.export.model_dump() else None

    def write_parity(self, measured: dict[str, Any]) -> None:
        content = {**measured, "export": self.config.export.model_dump()}
        storage.write_text(self.parity, json.dumps(content, indent=2) + "\n")

    def trained(self) -> str | None:
        """Return the text of training.json if a training of this length is finished; raises OSError."""
        try:
            text = storage.read_text(self.training)
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return None if self._changes(_length) else text

    def write_training(self, text: str) -> None:
        """Write training.json, so that export and registration can be retried without training."""
        storage.write_text(self.training, text)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, the last file of a run."""
        storage.write_text(self.result, json.dumps(result, indent=2) + "\n")

    def drop_result(self) -> None:
        """Delete result.json: the next attempt publishes and registers again, without training."""
        storage.remove(self.result)

    def tracking_run(self, uri: str) -> str | None:
        """Return the id of the MLflow run at `uri`, if an earlier attempt has created it."""
        kept = _read_json(self._tracking) or {}
        return str(kept["run_id"]) if kept.get("uri") == self._shown(uri) and kept.get("run_id") else None

    def keep_tracking_run(self, uri: str, run_id: str) -> None:
        """Write tracking.json, so that a later attempt resumes this MLflow run; passwords in `uri` are masked."""
        storage.write_text(self._tracking, json.dumps({"uri": self._shown(uri), "run_id": run_id}))

    def _shown(self, uri: str) -> str:
        # A database inside the storage is written relative to it, so that a moved storage still finds its MLflow run.
        return mask(uri).replace(f"sqlite:///{os.path.abspath(self.config.run.storage)}/", "sqlite:///<run.storage>/")

    def _identity(self) -> dict[str, str]:
        from olora_ray.train import checkpoint, checkpoints

        for name in reversed(checkpoints.names(self.checkpoints)):
            state = _read_json(storage.join(self.checkpoints, name, checkpoint.STATE)) or {}
            if isinstance(identity := state.get("identity"), dict):
                return identity
        done = self.finished() or {}
        base, data = done.get("base") or {}, done.get("data") or {}
        known = {
            "base model": base.get("digest"),
            "training data": data.get("train"),
            "held-out data": data.get("eval"),
        }
        return {what: str(digest) for what, digest in known.items() if digest is not None}


def _read_json(path: str) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if the file is missing or damaged. Raises OSError otherwise."""
    # An unreachable file must raise: as None it would mean "not finished", and the run would be trained again.
    try:
        tree = json.loads(storage.read_text(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


# The fingerprint of a model: digests of its four inputs. Equal fingerprints mean equal models.


NEUTRAL = frozenset({"activation_checkpointing", "keep", "log_every", "checkpoint_every", "start"})
"""Fields of the train section that do not change the result, or are paths."""
MODEL = frozenset({"dtype", "attention", "quantization"})
"""Fields of the model section that change the result, in addition to the base model itself."""
TAGS = {
    "base": "olora.base_digest",
    "data": "olora.data_digest",
    "held_out": "olora.held_out_digest",
    "settings": SETTINGS,
}
WORDS = {"base": "base model", "data": "training data", "held_out": "held-out data", "settings": "settings"}


@dataclass(frozen=True)
class Fingerprint:
    """Digests of the inputs of a model version."""

    base: str
    data: str
    """Digest of the training token store: contents, tokenizer, and the settings that turn rows into sequences."""
    held_out: str
    """Digest of the held-out token store; empty without held-out rows."""
    settings: str
    """Result of `settings_digest`."""

    def tags(self) -> dict[str, str]:
        return {tag: getattr(self, name) for name, tag in TAGS.items()}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> "Fingerprint":
        """Return the fingerprint from the tags of a version; a missing tag becomes '', which equals no digest."""
        return cls(**{name: tags.get(tag, "") for name, tag in TAGS.items()})

    def changes(self, before: "Fingerprint") -> list[str]:
        return [word for name, word in WORDS.items() if getattr(self, name) != getattr(before, name)]


def settings_digest(config: Config) -> str:
    """Return a digest of the settings that change the result: seed, precisions, attention, adapter, train, export.rank.

    Paths and names are left out, because the other digests cover the contents. Defaults are left out, so that a new
    field in a new release does not change the digest.
    """
    sections = {
        "adapter": config.adapter.model_dump(mode="json", exclude_defaults=True),
        "train": config.train.model_dump(mode="json", exclude_defaults=True, exclude=set(NEUTRAL)),
        "model": config.model.model_dump(mode="json", exclude_defaults=True, include=set(MODEL)),
        "seed": config.run.seed,
    }
    if config.export.rank is not None:  # compression changes the outputs, export.merged does not
        sections["export"] = {"rank": config.export.rank}
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:32]
