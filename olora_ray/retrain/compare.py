"""Comparison of challenger and champion on the same held-out rows, each as it lies in the registry."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from olora_ray.cluster.kind import kind_of
from olora_ray.common import kept, storage
from olora_ray.common.digests import digest_json
from olora_ray.common.errors import UserError
from olora_ray.config.evaluation import AnyConfig
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.evaluation.groups import group_numbers
from olora_ray.evaluation.held_out import measure
from olora_ray.evaluation.rows import RowResults
from olora_ray.model.load import pick_dtype
from olora_ray.pipeline import connection
from olora_ray.pipeline.base import Base, with_tokenizer
from olora_ray.pipeline.find_model import find_model, parts
from olora_ray.retrain import known_files
from olora_ray.retrain.changes import Inputs
from olora_ray.retrain.gate import HeldOut
from olora_ray.tokens.prepare import prepare
from olora_ray.tracking import checksums, registered
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.contents import ADAPTER_ONLY, EXPORT
from olora_ray.tracking.record import RUN
from olora_ray.tracking.start import resolve_uri
from olora_ray.tracking.version import Version
from olora_ray.train import scoring

logger = logging.getLogger(__name__)


def about_rows(config: Config, inputs: Inputs, rows: RowResults, champion: Version | None) -> HeldOut:
    """The groups of the held-out rows, and those that the champion was not trained on."""
    groups = group_numbers(config.gate.group, inputs.held_out, rows.origins)
    if champion is None:
        return HeldOut(groups)
    files = known_files.unseen(config, inputs.held_out, known_files.of_version(config, champion))
    if files is None:
        return HeldOut(groups)
    return HeldOut(groups, [row for row, (file, _) in enumerate(rows.origins) if file in files])


class NotComparable(UserError):
    """The two models do not see the same tokens."""


def measured(config: Config, inputs: Inputs, versions: list[Version]) -> list[RowResults]:
    """The held-out results of each version; what was measured before, by a run that was cut off too, is read again.

    Starts Ray if anything is left to be measured. Raises NotComparable for versions with different tokenizers.
    """
    notes = [_note(config, inputs, version) for version in versions]
    known = [_read(note) for note in notes]
    if None in known:
        with connection.connect(config):
            found = [_opened(config, version) for version in versions]
            _same_tokens([each.base for each in found])
            held_out = prepare(config, inputs.base.spec, "eval")
            for place, (version, note, each) in enumerate(zip(versions, notes, found, strict=True)):
                if known[place] is not None:
                    continue
                logger.info(f"measuring version {version.number} on the held-out rows")
                with connection.user_errors():
                    # Answers of both end with the same tokens: those of the config's base.
                    base = replace(inputs.base, model=each.base.model)
                    rows = measure(base, each.adapter, held_out, each.config)
                storage.write_text(note, rows.to_json())
                known[place] = rows
    return [rows for rows in known if rows is not None]


@dataclass(frozen=True)
class _Opened:
    """A registered version, ready to be measured."""

    config: AnyConfig
    """Names the model of `base`."""
    base: Base
    adapter: str | None
    """Of an adapter-only version."""


def _opened(config: Config, version: Version) -> _Opened:
    name, folder = f"models:/{version.name}/{version.number}", version.tags.get(RUN, "")
    merged = version.tags.get(EXPORT) != ADAPTER_ONLY
    fetched = merged and storage.is_uri(config.run.storage) and storage.is_uri(folder)
    if fetched:
        name = storage.join(folder, "export", "merged")  # each node fetches it by itself
    config = override(config, {"model.name": name, "model.revision": None})
    found = registered.of_config(config)
    if found is not None and found.base is not None:
        own, model, adapter = parts(found, found.base, config)
        return _Opened(own, with_tokenizer(model, own), adapter)
    base = with_tokenizer(find_model(config, found), config)
    if fetched:
        Aliases(resolve_uri(config), version.name).verify_copy(version.number, Path(base.model.folder))
    return _Opened(config, base, None)


def _same_tokens(bases: list[Base]) -> None:
    if len({base.spec.digest for base in bases}) > 1:
        raise NotComparable("the champion has another tokenizer, so nothing is measured on the same tokens")


def _note(config: Config, inputs: Inputs, version: Version) -> str:
    """The file of a version's results; its name is a hash of all that they depend on."""
    scorer = config.evaluation.scorer
    parts = [
        [version.name, version.number, version.run_id, version.tags.get(checksums.TAG)],
        inputs.fingerprint.held_out,
        config.evaluation.model_dump_json(),
        scoring.source_digest(scorer) if scorer else None,
        kept.code(),
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


def _read(note: str) -> RowResults | None:
    try:
        return RowResults.from_json(storage.read_text(note))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None  # not there, damaged, or of an older release
