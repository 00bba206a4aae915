"""Comparison of challenger and champion on the same held-out rows, each as it lies in the registry."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.worker_context import kind_of
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest, digest_json
from olora_ray.config.load import override
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.evaluation.groups import group_numbers
from olora_ray.evaluation.held_out import measure
from olora_ray.evaluation.rows import RowResults
from olora_ray.model.folder import CONFIG
from olora_ray.model.load import pick_dtype
from olora_ray.pipeline import connection
from olora_ray.pipeline.base import Base, find_model, parts, with_tokenizer
from olora_ray.pipeline.run_folder import where_now
from olora_ray.retrain import recipe
from olora_ray.retrain.gate import HeldOut
from olora_ray.retrain.recipe import Inputs
from olora_ray.tokens.prepare import prepare
from olora_ray.tracking import checksums, models
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.checksums import RUN, Version
from olora_ray.tracking.models import ADAPTER_ONLY, EXPORT
from olora_ray.tracking.start import resolve_uri
from olora_ray.train import scoring

logger = logging.getLogger(__name__)


def about_rows(config: Config, inputs: Inputs, rows: RowResults, champion: Version | None) -> HeldOut:
    """The groups of the held-out rows, and those that the champion was not trained on."""
    groups = group_numbers(config.gate.group, inputs.held_out, rows.origins)
    if champion is None:
        return HeldOut(groups)
    files = recipe.unseen_rows(config, inputs.held_out, recipe.of_version(config, champion))
    if files is None:
        return HeldOut(groups)
    return HeldOut(groups, [row for row, (file, _) in enumerate(rows.origins) if file in files])


class NotComparable(UserError):
    """The two models do not see the same tokens."""


def measured(config: Config, inputs: Inputs, versions: list[Version]) -> list[RowResults]:
    """The held-out results of each version; what was measured before, by a run that was cut off too, is read again.

    Starts Ray, and opens versions, if any are left to be measured. Raises NotComparable for versions with different
    tokenizers.
    """
    notes = [note_file(config, inputs, version) for version in versions]
    known = [_read(note) for note in notes]
    _same_tokens([each.tokenizer for each in known if each])
    if None in known:
        with connection.connect(config):
            found = {place: _opened(config, versions[place]) for place, each in enumerate(known) if each is None}
            _same_tokens([*(each.tokenizer for each in known if each), *(each.tokenizer for each in found.values())])
            with user_errors():
                held_out = prepare(config, inputs.base.spec, "eval")
            for place, each in found.items():
                logger.info(f"measuring version {versions[place].number} on the held-out rows")
                with user_errors():
                    # Answers of both end with the same tokens: those of the config's base.
                    base = replace(inputs.base, model=each.base.model)
                    rows = measure(base, each.adapter, held_out, each.config)
                known[place] = done = Measured(each.tokenizer, rows)
                storage.write_text(notes[place], done.to_json())
    return [each.rows for each in known if each is not None]


@dataclass(frozen=True)
class Measured:
    """The results of a version, as they are kept."""

    tokenizer: str
    """Digest of the version's tokenizer: who knows the results need not open the version for it."""
    rows: RowResults

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps({"tokenizer": self.tokenizer, "rows": self.rows.to_json()})

    @classmethod
    def from_json(cls, text: str) -> "Measured":
        """Read `to_json` back; raises as RowResults.from_json for others."""
        tree = json.loads(text)
        return cls(str(tree["tokenizer"]), RowResults.from_json(tree["rows"]))


@dataclass(frozen=True)
class _Opened:
    """A registered version, ready to be measured."""

    config: AnyConfig
    """Names the model of `base`."""
    base: Base
    adapter: str | None
    """Of an adapter-only version."""

    @property
    def tokenizer(self) -> str:
        """Digest of its tokenizer."""
        return self.base.spec.digest


def _opened(config: Config, version: Version) -> _Opened:
    named = _with_model(config, f"models:/{version.name}/{version.number}")
    if storage.is_uri(config.run.storage) and version.tags.get(EXPORT) != ADAPTER_ONLY:
        # Each node fetches it by itself, and none but this one from MLflow.
        named = _with_model(config, _in_run_folder(config, version) or _copied(named, version))
        base = with_tokenizer(find_model(named), named)
        if checksums.TAG in version.tags:
            Aliases(resolve_uri(config), version.name).verify_copy(version.number, Path(base.model.folder))
        return _Opened(named, base, None)
    found = models.of_config(named)
    if found is not None and found.base is not None:
        own, model, adapter = parts(found, found.base, named)
        return _Opened(own, with_tokenizer(model, own), adapter)
    return _Opened(named, with_tokenizer(find_model(named, found), named), None)


def _with_model(config: Config, name: str) -> Config:
    return override(config, {"model.name": name, "model.revision": None})


def _in_run_folder(config: Config, version: Version) -> str | None:
    """The address of a merged version in its run's folder; None if it is not there: that folder may be deleted."""
    folder = where_now(version.tags.get(RUN, ""), config.run.storage)
    place = storage.join(folder, "export", "merged")
    return place if storage.is_uri(folder) and storage.exists(storage.join(place, CONFIG)) else None


def _copied(named: Config, version: Version) -> str:
    """The address of a copy of MLflow's files of a merged version in the storage; it is made once."""
    key = digest(resolve_uri(named), version.name, version.number, version.tags.get(checksums.TAG, ""), length=16)
    place = storage.join(named.run.storage, "models", key)
    if not storage.exists(storage.join(place, CONFIG)):
        found = models.of_config(named)
        assert found is not None
        node_cache.upload(found.folder, place, last=CONFIG)
    return place


def _same_tokens(tokenizers: Sequence[str]) -> None:
    if len(set(tokenizers)) > 1:
        raise NotComparable("the champion has another tokenizer, so nothing is measured on the same tokens")


def note_file(config: Config, inputs: Inputs, version: Version) -> str:
    """The file of a version's results; its name is a hash of all that they depend on."""
    scorer = config.evaluation.scorer
    parts = [
        [version.name, version.number, version.run_id, version.tags.get(checksums.TAG)],
        inputs.fingerprint.held_out,
        config.evaluation.model_dump_json(),
        scoring.source_digest(scorer) if scorer else None,
        node_cache.code(),
        _computed_by(config),
    ]
    key = digest_json(parts, length=32)
    return storage.join(config.run.storage, "retraining", "rows", f"{key}.json")


def _computed_by(config: Config) -> list[str]:
    """Precision, attention, and what they are computed on, as far as that is known before Ray is asked.

    Two that were measured by bfloat16 on a GPU and by float32 on a CPU are not measured by one yardstick.
    """
    gpus = config.cluster.gpus_per_worker
    device = torch.device("cuda", 0) if gpus and torch.cuda.is_available() else torch.device("cpu")
    kind = {what: text for what, text in kind_of(device).items() if what != "threads"}
    # Which attention follows from `auto` is the same for the same device, precision, libraries and files.
    return [str(pick_dtype(config.model, device)), config.model.attention, str(gpus), *kind.values()]


def _read(note: str) -> Measured | None:
    try:
        return Measured.from_json(storage.read_text(note))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None  # not there, damaged, or of an older release
