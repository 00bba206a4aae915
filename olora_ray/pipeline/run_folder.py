"""The run folder `<storage>/<name>/`: its paths, and the checks that it belongs to this run.

A run is identified by its settings and by the contents of its model and data. Their paths may change between attempts.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from olora_ray.common import records, storage
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.secrets import mask
from olora_ray.common.text import some
from olora_ray.config import command_line
from olora_ray.config.decided import KEPT, NOTHING, Decision, Decisions, Kept, lasting_settings
from olora_ray.config.load import (
    LENGTH,
    at,
    dump,
    flatten,
    override,
    read_config,
)
from olora_ray.config.schema import IN_STORAGE, Config, Export
from olora_ray.config.section import is_auto
from olora_ray.tracking.checksums import HELD_OUT, SETTINGS

if TYPE_CHECKING:
    from olora_ray.cluster.spec import TrainResult

logger = logging.getLogger(__name__)

PATH_FIELDS = re.compile(
    r"model\.(name|revision)|data\.(train|eval)\.\d+\.(path|only)|data\.chat_template|train\.start"
)
"""Fields with paths and names of contents; a resumed run compares the contents instead."""
DELIVERY = re.compile(r"(export|registry)\.(?!push$).+")
"""Fields of export and registration. `publish.push` needs no new export, and sees by itself whether it is done."""


LEFT_OUT = re.compile(r"data\.(train|eval)\.\d+\.fields\..+")
"""Columns of sources."""
DECIDED = "decided.json"
"""File with each field that was asked for as auto, its value, and why."""
Settings = dict[str, Any]
"""Dotted fields of a config, and their values."""


def identity_settings(settings: Settings) -> Settings:
    """Return the settings that must not change in a run folder: neither free to change nor paths of contents.

    search.json has them, and the name of a retrained run is made of them, so all releases must give the same.
    """
    bound = {
        field: value
        for field, value in lasting_settings(settings).items()
        if not PATH_FIELDS.fullmatch(field)
    }
    return bound | {"train.start": "a checkpoint" if settings.get("train.start") else None}


def _compared(settings: Settings) -> Settings:
    # A column that is left out (`fields: {NAME: none}`) changes no token.
    return {
        field: value
        for field, value in identity_settings(settings).items()
        if not (LEFT_OUT.fullmatch(field) and value == "none")
    }


def _length(settings: Settings) -> Settings:
    field = "train.epochs" if settings["train.steps"] is None else "train.steps"
    return {field: settings[field]}


Part = Callable[[Settings], Settings]
"""Returns the settings that count for a comparison."""


def _fields(wanted: Callable[[str], object], part: Part = dict) -> Part:
    return lambda settings: {name: value for name, value in part(settings).items() if wanted(name)}


ALL_BUT_LENGTH = _fields(lambda field: field not in LENGTH, _compared)
ALL_BUT_EVALUATION = _fields(lambda field: not field.startswith("evaluation."), ALL_BUT_LENGTH)


@dataclass(frozen=True)
class RunState:
    """The facts that earlier attempts have left in a run folder; `RunFolder.state` reads them."""

    root: str
    config: Config | None
    """The content of config.yaml, with the values of decided.json."""
    decisions: Decisions
    """The content of decided.json."""
    precision: str | None
    """The precision in which the run started, from the newest checkpoint."""
    step: int | None
    """Step of the newest checkpoint, which may be damaged; None without checkpoints."""
    identity: Mapping[str, str]
    """Digests of the contents that the run was trained with, by their names; empty if they are unknown."""
    training: "TrainResult | None"
    """The content of training.json; None if it is missing or damaged."""
    result: dict[str, Any] | None
    """The content of result.json; None if it is missing or damaged."""

    @property
    def kept(self) -> Kept:
        """The decisions that the next attempt keeps; none without a checkpoint or result."""
        if self.config is None or (self.step is None and self.result is None):
            return NOTHING
        return Kept(flatten(self.config), self.decisions, self.precision)

    def finished(self, config: Config) -> dict[str, Any] | None:
        """Return the result if the run is finished and has the length of `config`."""
        if self.changes(config, _length):
            return None
        return self.result

    def trained(self, config: Config) -> "TrainResult | None":
        """Return the result of the training if it is finished and has the length of `config`."""
        if self.changes(config, _length):
            return None
        return self.training

    def other_settings(self, config: Config) -> str:
        """Return the changed settings that affect the result, with both values."""
        return self.changes(config, _compared)

    def moved(self, config: Config) -> str:
        """Return the changed paths of model and data, with both values; empty if there are none."""
        return self.changes(config, _fields(PATH_FIELDS.fullmatch))

    def delivered_otherwise(self, config: Config) -> str:
        return self.changes(config, _fields(DELIVERY.fullmatch))

    def changes(self, config: Config, part: Part) -> str:
        """Return up to four fields of `part` in which `config` differs from config.yaml, with both values."""
        if self.config is None:
            return ""
        old = part(flatten(self.config))
        new = part(flatten(config))
        changed = []
        for field in sorted(old.keys() | new.keys()):
            before = old.get(field)
            now = new.get(field)
            # A version without decided.json left auto where the decision follows from the contents.
            if before != now and not (is_auto(before) and KEPT.fullmatch(field)):
                changed.append(f"{field} was {before!r}, is {now!r}")
        return ", ".join(changed[:4])

    def problem(self, config: Config) -> str:
        """Return why `config` cannot resume the run with its name; empty if it can, or if there is no run."""
        if self.config is None or (self.step is None and self.result is None):
            return ""
        run = f"{config.run.name!r}"
        if self.changes(config, ALL_BUT_LENGTH):
            problem = f"run.name: {run} exists with other settings ({self.other_settings(config)})"
            if self.result is not None and not self.changes(config, ALL_BUT_EVALUATION):
                problem += f"; to evaluate its model so, run olora-ray evaluate {self.root} evaluation.FIELD=VALUE"
            return problem
        shown = self.changes(config, _length)
        if not shown:
            return ""
        if self.step is None:
            return f"run.name: {run} has another length ({shown}), but no checkpoint to resume from"
        train = config.train
        kept = self.config.train
        done = self.step
        ended = self.training and self.training.state
        if train.early_stop and ended and ended.stale >= train.early_stop:
            return f"train.early_stop: {run} has stopped early, after step {done}, and is not trained longer ({shown})"
        # The number of steps of an epoch is not known here. A run that was cut short by train.steps may continue in
        # epochs; the workers refuse it if these have fewer steps than are done.
        more_epochs = train.steps is None and (kept.steps is not None or train.epochs > kept.epochs)
        if more_epochs or (train.steps or 0) >= done:
            return ""
        return f"train.steps: {run} has already done {done} steps ({shown}); set train.steps={done} or more"

    def require_same(self, config: Config, contents: Mapping[str, str]) -> None:
        """Raise UserError if the run was trained with other contents; `contents` has digests by their names.

        Only the digests in `contents` are compared. A run without checkpoint and result passes.
        """
        from olora_ray.train import checkpoint

        if any(self.identity.get(name, digest) != digest for name, digest in contents.items()):
            shown = self.moved(config)
            location = f"{self.root} ({shown})" if shown else self.root
            checkpoint.require_same({**contents, **self.identity}, contents, location)


OF_MODEL = re.compile(r"data\.packing|data\.(train|eval)\.\d+\.chat")
"""Decisions that another model would not share."""


def read_settings(root: str) -> tuple[Config, Decisions]:
    """Return config.yaml of a run folder with the values of decided.json, and the latter; raises ValueError."""
    decisions = read_decisions(root)
    return _with_decisions(root, decisions), decisions


def read_for_others(root: str) -> Config:
    """Return config.yaml of a run folder for evaluations, also of other models: with its formats and numbers."""
    decisions = {
        name: decision
        for name, decision in read_decisions(root).items()
        if not name.startswith("cluster.") and not OF_MODEL.fullmatch(name)
    }
    return _with_decisions(root, decisions)


def _with_decisions(root: str, decisions: Decisions) -> Config:
    config = read_config(storage.join(root, "config.yaml"))
    values = {
        name: decision.value
        for name, decision in decisions.items()
        if at(config, name) == decision.asked
    }
    return override(config, values)


def read_decisions(root: str) -> Decisions:
    return records.read(storage.join(root, DECIDED), dict[str, Decision]) or {}


class RunFolder:
    """The paths of a run, and its files. It knows no config: a stage gets the one config that the run has by then."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.settings = storage.join(root, "config.yaml")
        self.checkpoints = storage.join(root, "checkpoints")
        self.adapter = self.export("adapter")
        self.merged = self.export("merged")
        self.parity = self.export("parity.json")
        self.training = storage.join(root, "training.json")
        self.result = storage.join(root, "result.json")
        self.page = storage.join(root, "report.html")
        self._tracking = storage.join(root, "tracking.json")
        self._used = storage.join(root, "used.json")

    def export(self, name: str) -> str:
        """Return the folder of an export, such as gguf."""
        return storage.join(self.root, "export", name)

    def check(self, config: Config) -> RunState:
        """Check that the storage is writable and that no run with other settings has this name; write nothing.

        Return the state of that run. Another length is allowed. Raises UserError if a check fails, and TryAgain if an
        object store does not answer.
        """
        storage.check_storage(config.run.storage, "run.storage")
        with as_user_error(
            f"run.storage: {self.root} cannot be read", OSError, reason=short_reason
        ):
            state = self.state()
        problem = state.problem(state.kept.filled(config))
        if problem:
            raise UserError(
                f"{problem}; set another run.name, remove run.name, or delete {self.root}"
            )
        return state

    def state(self) -> RunState:
        """Read what earlier attempts have left; raises OSError, and UserError for a config.yaml that does not read."""
        # Here, because a retraining without changes needs no torch.
        from olora_ray.cluster.spec import TrainResult
        from olora_ray.train import checkpoints

        config = None
        decisions: Decisions = {}
        if storage.exists(self.settings):
            try:
                config, decisions = read_settings(self.root)
            except ValueError as error:
                # Never "delete these fields": the numbers of the run may depend on them.
                raise UserError(
                    f"{self.root} was written by another version of olora_ray, or its config.yaml was changed"
                    f" ({str(error).replace(self.settings, 'config.yaml')[:200]}); set another run.name, or delete the"
                    " folder"
                ) from None
        step, kept = checkpoints.newest(self.checkpoints)
        result = records.read(self.result, dict[str, Any])
        metrics = (result or {}).get("metrics", {})
        if not isinstance(metrics, dict) or not all(
            isinstance(each, int | float | None) for each in metrics.values()
        ):
            result = None
        identity = kept.identity or _identity_in(result or {})
        training = records.read(self.training, TrainResult)
        return RunState(
            self.root, config, decisions, kept.precision, step, identity, training, result
        )

    def write_config(self, config: Config, decisions: Decisions, state: RunState) -> None:
        """Write decided.json and config.yaml, which claims the name for this run.

        After a change of length, delete the old results.
        """
        shown = state.changes(config, _length)
        if shown:
            if state.step:
                logger.info(
                    f"{shown}: training continues after step {state.step} with the optimizer's state and the schedule"
                    " of the new length; the result equals a run with this length from the start only with"
                    " train.schedule=constant and train.warmup=0"
                )
            # Delete the results before the config is written. If the driver dies in between, old results beside the new
            # config would look like the results of the longer run.
            storage.remove(self.training)
            if state.result:  # `olora-ray runs` shows it until the longer run ends
                records.write(storage.join(self.root, "earlier.json"), state.result)
            storage.remove(self.result)
        self.write_decisions(decisions)
        storage.write_text(self.settings, dump(config))

    def decisions(self) -> Decisions:
        return read_decisions(self.root)

    def write_decisions(self, decisions: Decisions) -> None:
        tree = {
            name: {"asked": decision.asked, "value": decision.value, "why": decision.why}
            for name, decision in decisions.items()
        }
        records.write(storage.join(self.root, DECIDED), tree, indent=2, end="\n")

    def exported(self, config: Config, step: int) -> dict[str, Any] | None:
        """Return the parity report of complete exports of the best adapter after `step` steps.

        None if there are none, or if the export settings have changed since.
        """
        report = records.read(self.parity, dict[str, Any])
        if not report or report.get("ok") is not True or report.get("step") != step:
            return None
        # A change of the settings of the export since then needs other exports. Fields that have come since are at
        # their defaults in an older report, and `also` was `gguf`.
        before = report.pop("export", None)
        try:
            if Export.model_validate(before) == config.export:
                return report
        except ValueError:
            pass
        return None

    def write_parity(self, config: Config, measured: dict[str, Any]) -> None:
        records.write(
            self.parity, {**measured, "export": config.export.model_dump()}, indent=2, end="\n"
        )

    def write_training(self, result: "TrainResult") -> None:
        records.write(self.training, result)

    def write_result(self, result: dict[str, Any]) -> None:
        records.write(self.result, result, indent=2, end="\n")

    def drop_result(self) -> None:
        """Delete result.json: the next attempt publishes and registers again, without training."""
        storage.remove(self.result)

    def used(self) -> dict[str, float]:
        """Return the seconds of CPUs and GPUs that the workers of all attempts had, by Ray's names of resources."""
        return records.read(self._used, dict[str, float]) or {}

    def keep_used(self, seconds: Mapping[str, float]) -> None:
        records.write(self._used, dict(seconds))

    def tracking_run(self, uri: str, storage_root: str) -> str | None:
        """Return the id of the MLflow run at `uri`, if an earlier attempt has created it."""
        kept = records.read(self._tracking, dict[str, Any]) or {}
        if kept.get("uri") == _shown(uri, storage_root) and kept.get("run_id"):
            return str(kept["run_id"])
        return None

    def keep_tracking_run(self, uri: str, storage_root: str, run_id: str) -> None:
        """Write tracking.json, so that a later attempt resumes this MLflow run; passwords in `uri` are masked."""
        records.write(self._tracking, {"uri": _shown(uri, storage_root), "run_id": run_id})


def _shown(uri: str, storage_root: str) -> str:
    # A database inside the storage is written relative to it, so that a moved storage still finds its MLflow run.
    return mask(uri).replace(
        f"sqlite:///{os.path.abspath(storage_root)}/", "sqlite:///<run.storage>/"
    )


def _identity_in(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the identity of a finished run whose checkpoints are gone."""
    base = result.get("base") or {}
    data = result.get("data") or {}
    known = {
        "base model": base.get("digest"),
        "training data": data.get("train"),
        "held-out data": data.get("eval"),
    }
    return {what: str(digest) for what, digest in known.items() if digest is not None}


# The fingerprint of a model: digests of its four inputs. Equal fingerprints mean equal models.


RESULT_NEUTRAL = frozenset(
    {"activation_checkpointing", "micro_batch", "keep", "log_every", "checkpoint_every", "start"}
)
"""Fields of the train section that do not change the result, or only by rounding, or are paths."""
MODEL = frozenset({"dtype", "attention", "quantization"})
"""Fields of the model section that change the result, in addition to the base model itself."""
TAGS = {
    "base": "olora.base_digest",
    "data": "olora.data_digest",
    "held_out": HELD_OUT,
    "settings": SETTINGS,
}
WORDS = {
    "base": "base model",
    "data": "training data",
    "held_out": "held-out data",
    "settings": "settings",
}


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
    earlier_settings: str = ""
    """The digest that an earlier release gave to the same settings."""

    def tags(self) -> dict[str, str]:
        return {tag: getattr(self, name) for name, tag in TAGS.items()}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> "Fingerprint":
        """Return the fingerprint from the tags of a version; a missing tag becomes '', which equals no digest."""
        return cls(**{name: tags.get(tag, "") for name, tag in TAGS.items()})

    def changes(self, before: "Fingerprint") -> list[str]:
        now = self
        if before.settings and before.settings == self.earlier_settings:
            now = replace(self, settings=self.earlier_settings)
        return [word for name, word in WORDS.items() if getattr(now, name) != getattr(before, name)]


def history(root: str) -> Sequence[Mapping[str, float]]:
    """Return the rows of metrics of a finished training, each with its `step`; () if they are lost."""
    from olora_ray.cluster.spec import TrainResult

    trained = records.read(RunFolder(root).training, TrainResult)
    if trained is None or trained.state is None:
        return ()
    return trained.state.history


MARKS = {"config.yaml", "checkpoints", "search.json", "compare.json", "report.html"}
"""Names of which the folder of each run, search or comparison has one."""


def named(name: str) -> str:
    """Return the folder of the run, search or comparison `name`, a name in ./runs or a folder; raise UserError if none.

    The name in ./runs comes first: a recipe's folder, which has a config.yaml too, may have the same name.
    """
    runs = command_line.absolute("runs")
    for folder in (storage.join(runs, name), command_line.absolute(name)):
        with as_user_error(f"{name}: cannot be read", OSError, reason=short_reason):
            if not MARKS.isdisjoint(storage.names(folder)):
                return folder.rstrip("/")
    there = [each for each in storage.names(runs) if each not in IN_STORAGE]
    raise UserError(f"run {name}: no such run folder; {runs} has {some(there, 8) or 'no runs'}")


def where_now(folder: str, storage_root: str) -> str:
    """Return `folder`, or the folder of the same name in `storage_root` if the whole storage was moved."""
    moved = storage.join(storage_root, folder.rstrip("/").rpartition("/")[2])
    if folder and not storage.exists(folder) and storage.exists(moved):
        return moved
    return folder


PREFERRED = "eval/pairs/preferred"
"""Metric: the share of the held-out preference pairs whose preferred answer gained more."""


def main_score(result: Mapping[str, Any]) -> str:
    """Return the number by which a list names a run, such as `0.912 exact_match`; "" if only losses were measured.

    That is the share of pairs preferred, or the lowest of the scorer's means after training: the strictest one.
    """
    preferred = result.get("metrics", {}).get(PREFERRED)
    if preferred is not None:
        return f"{preferred:.2f} preferred"
    after = result.get("scores", {}).get("after", {})
    if not after:
        return ""
    name = min(after, key=after.get)
    return f"{after[name]:.3f} {name}"


def by_step(rows: Iterable[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Return the metrics of rows by their field `step`."""
    found = {}
    for row in rows:
        found[int(row["step"])] = {name: value for name, value in row.items() if name != "step"}
    return found


def earlier_settings_digest(config: Config) -> str:
    """Return the digest that releases gave to the same settings in which `train.micro_batch` counted, by default 4."""
    counted = {"micro_batch"} if config.train.micro_batch != 4 else set[str]()
    return settings_digest(config, RESULT_NEUTRAL - counted)


def settings_digest(config: Config, neutral: frozenset[str] = RESULT_NEUTRAL) -> str:
    """Return a digest of the settings that change the result: seed, precisions, attention, adapter, train, export.rank.

    Paths and names are left out, because the other digests cover the contents. Defaults are left out, so that a new
    field in a new release does not change the digest.
    """
    sections = {
        "adapter": config.adapter.model_dump(mode="json", exclude_defaults=True),
        "train": config.train.model_dump(mode="json", exclude_defaults=True, exclude=set(neutral)),
        "model": config.model.model_dump(mode="json", exclude_defaults=True, include=set(MODEL)),
        "seed": config.run.seed,
    }
    if config.export.rank is not None:  # compression changes the outputs, export.merged does not
        sections["export"] = {"rank": config.export.rank}
    return storage.digest_json(sections, length=32)
