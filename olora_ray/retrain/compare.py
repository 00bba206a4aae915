"""Challenger and champion on the same held-out rows, each as it lies in the registry."""

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config, override
from olora_ray.data.tokenize import spec_from_pretrained
from olora_ray.evaluation.held_out import measure
from olora_ray.evaluation.rows import RowResults
from olora_ray.model import source
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import fit, publish
from olora_ray.retrain.changes import Inputs
from olora_ray.retrain.recipe import RUN
from olora_ray.tokens import store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

Say = Callable[[str], None]


class NotComparable(UserError):
    """The two models do not see the same tokens."""


def measured(config: Config, inputs: Inputs, versions: list["ModelVersion"], say: Say) -> list[RowResults]:
    """The held-out results of each version; what was measured before, by a run that was cut off too, is read again.

    Starts Ray if anything is left to be measured. Raises NotComparable for versions with different tokenizers.
    """
    notes = [_note(config, inputs, version) for version in versions]
    known = [_read(note) for note in notes]
    if None in known:
        with fit.connect(config, say):
            found = [_as_base(config, version, say) for version in versions]
            _same_tokens(config, found)
            held_out = store.prepare(config, inputs.spec, "eval", say)
            tokenizer = source.load_tokenizer(inputs.base, config.model)
            eos = source.end_tokens(inputs.base, tokenizer)
            for place, (version, note) in enumerate(zip(versions, notes, strict=True)):
                if known[place] is not None:
                    continue
                say(f"measuring version {version.version} on the held-out rows")
                with fit.user_errors():
                    rows = measure(found[place][1], None, held_out, found[place][0], tokenizer, eos, say)
                storage.write_text(note, rows.to_json())
                known[place] = rows
    return [rows for rows in known if rows is not None]


def _as_base(config: Config, version: "ModelVersion", say: Say) -> tuple[Config, BaseModel]:
    """A registered version as a model that is loaded, and the config that says so."""
    name, folder = f"models:/{version.name}/{version.version}", version.tags.get(RUN, "")
    if storage.is_uri(config.run.storage) and storage.is_uri(folder):
        name = storage.join(folder, "export", "merged")  # each node fetches it by itself
    config = override(config, {"model.name": name, "model.revision": None})
    return config, source.obtain(config, say, publish.registered(config))


def _same_tokens(config: Config, found: list[tuple[Config, BaseModel]]) -> None:
    specs = {spec_from_pretrained(source.load_tokenizer(base, config.model)).digest for _, base in found}
    if len(specs) > 1:
        raise NotComparable("the champion has another tokenizer, so nothing is measured on the same tokens")


def _note(config: Config, inputs: Inputs, version: "ModelVersion") -> str:
    """Where the results of a version lie; the name follows from all that they depend on."""
    parts = [
        version.run_id,
        inputs.fingerprint.held_out,
        config.evaluation.model_dump_json(),
        config.model.dtype,
        config.model.attention,
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return storage.join(config.run.storage, "retraining", "rows", f"{key}.json")


def _read(note: str) -> RowResults | None:
    try:
        return RowResults.from_json(storage.read_text(note))
    except (OSError, ValueError, KeyError, TypeError):
        return None
