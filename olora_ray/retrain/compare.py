"""Comparison of challenger and champion, as they are in the registry, on the same held-out rows."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.worker_context import kind_of
from olora_ray.common import node_cache, records, storage
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
from olora_ray.retrain import recipe
from olora_ray.retrain.gate import HeldOut
from olora_ray.retrain.recipe import Inputs
from olora_ray.tokens.prepare import prepare
from olora_ray.tracking import models
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.checksums import RUN, Version
from olora_ray.tracking.start import resolve_uri
from olora_ray.train import scoring

logger = logging.getLogger(__name__)


def about_rows(config: Config, inputs: Inputs, rows: RowResults, champion: Version | None) -> HeldOut:
    """Return the groups of the held-out rows, and the rows that the champion was not trained on."""
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
    """Return the held-out results of each version. Results that an earlier or interrupted call stored are read again.

    Starts Ray and opens versions only if a result is missing. Raises NotComparable if the tokenizers differ.
    """
    notes = [note_file(config, inputs, version) for version in versions]
    known = [records.read(note, Measured) for note in notes]
    _same_tokens([each.tokenizer for each in known if each])
    if None in known:
        with connection.connect(config):
            opened = {index: _opened(config, versions[index]) for index, each in enumerate(known) if each is None}
            digests = (base.spec.digest for _, base, _ in opened.values())
            _same_tokens([*(each.tokenizer for each in known if each), *digests])
            with user_errors():
                held_out = prepare(config, inputs.base.spec, "eval", tell=False)  # the training has told it
            for index, (named, own, adapter) in opened.items():
                logger.info(f"measuring version {versions[index].number} on the held-out rows")
                with user_errors():
                    # The answers of both versions end at the same tokens, which the config's base model defines.
                    rows, _ = measure(replace(inputs.base, model=own.model), adapter, held_out, named)
                known[index] = done = Measured(own.spec.digest, rows)
                records.write(notes[index], done)
    return [each.rows for each in known if each is not None]


@dataclass(frozen=True)
class Measured:
    """The results of a version, as they are stored."""

    tokenizer: str
    """Digest of the version's tokenizer, so that stored results can be compared without opening the version."""
    rows: RowResults


def _opened(config: Config, version: Version) -> tuple[AnyConfig, Base, str | None]:
    """Return (config whose `model` names the model of the base, base, adapter's folder of an adapter-only version)."""
    named = _with_model(config, f"models:/{version.name}/{version.number}")
    if storage.is_uri(config.run.storage) and not version.adapter_only:
        # The nodes read the model from the storage. Only the driver reads from MLflow.
        named = _with_model(config, _in_run_folder(config, version) or _copied(named, version))
        base = with_tokenizer(find_model(named), named)
        if version.checksum:
            Aliases(resolve_uri(config), version.name).verify_copy(version.number, Path(base.model.folder))
        return named, base, None
    registered = models.of_config(named)
    if registered is not None and registered.base is not None:
        own, model, adapter = parts(registered, registered.base, named)
        return own, with_tokenizer(model, own), adapter
    return named, with_tokenizer(find_model(named, registered), named), None


def _with_model(config: Config, name: str) -> Config:
    return override(config, {"model.name": name, "model.revision": None})


def _in_run_folder(config: Config, version: Version) -> str | None:
    """Return the address of a merged version in its run folder; None if that folder was deleted."""
    folder = recipe.where_now(version.tags.get(RUN, ""), config.run.storage)
    merged = storage.join(folder, "export", "merged")
    return merged if storage.is_uri(folder) and storage.exists(storage.join(merged, CONFIG)) else None


def _copied(named: Config, version: Version) -> str:
    # The copy is made once, under a name that identifies the version.
    key = digest(resolve_uri(named), version.name, version.number, version.checksum, length=16)
    copy = storage.join(named.run.storage, "models", key)
    if not storage.exists(storage.join(copy, CONFIG)):
        registered = models.of_config(named)
        assert registered is not None
        node_cache.upload(registered.folder, copy, last=CONFIG)
    return copy


def _same_tokens(tokenizers: Sequence[str]) -> None:
    if len(set(tokenizers)) > 1:
        raise NotComparable("the champion has another tokenizer, so the two losses cannot be compared")


def note_file(config: Config, inputs: Inputs, version: Version) -> str:
    """Return the file of a version's results; its name is a hash of everything that the results depend on."""
    scorer = config.evaluation.scorer
    parts = [
        [version.name, version.number, version.run_id, version.checksum or None],
        inputs.fingerprint.held_out,
        config.evaluation.model_dump_json(),
        scoring.source_digest(scorer) if scorer else None,
        node_cache.code(),
        _computed_by(config),
    ]
    key = digest_json(parts, length=32)
    return storage.join(config.run.storage, "retraining", "rows", f"{key}.json")


def _computed_by(config: Config) -> list[str]:
    """Return precision, attention and device of the measurement, as far as they are known without Ray."""
    # These are part of the key, because a result in bfloat16 on a GPU cannot be compared with one in float32 on a CPU.
    gpus = config.cluster.gpus_per_worker
    device = torch.device("cuda", 0) if gpus and torch.cuda.is_available() else torch.device("cpu")
    hardware = {name: text for name, text in kind_of(device).items() if name != "threads"}
    # attention=auto needs no resolution here: it depends only on device, precision, libraries and files.
    return [str(pick_dtype(config.model, device)), config.model.attention, str(gpus), *hardware.values()]
