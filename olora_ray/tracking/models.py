"""A merged folder or an adapter as a version of a registered MLflow model.

The weights go from the folder to the artifact store in one copy, and no model is loaded. What is logged:

    MLmodel, requirements.txt, python_env.yaml, input_example.json     mlmodel.py
    model/                   the merged folder; or
    peft/                    the adapter's folder, of an adapter-only version
    components/tokenizer/    its tokenizer files again, where the flavour looks for them
    checksums.json           size and SHA-256 of all of these; see checksums.py
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from olora_ray.common.errors import UserError, first_line
from olora_ray.common.fault_points import reached
from olora_ray.tracking import checksums, mlmodel, record
from olora_ray.tracking.aliases import CHAMPION, GATE, Aliases
from olora_ray.tracking.client import is_unavailable
from olora_ray.tracking.contents import ADAPTER_ONLY, EXPORT, Contents
from olora_ray.tracking.mlmodel import has_chat_template as has_chat_template
from olora_ray.tracking.run import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

NOTE = "mlflow.note.content"
"""Tag that MLflow shows as the description of a run or a logged model."""
DESCRIPTION_LENGTH = 5000
"""Of a version and a registered model: MLflow's column, which PostgreSQL and MySQL enforce."""
ABOUT = """The versions of this model were trained by olora_ray. Each has a description of its own: what it was trained\
 on, how it did, and how to load it.

- `champion`: the version in use
- `previous`: the champion before it, to which a rollback returns
- `challenger`: the newest retrained version, if it has not passed the gate
"""


def register(tracker: Tracker, contents: Contents, name: str, alias: str, tags: Mapping[str, object]) -> int:
    """Log `contents` as a model of the tracker's run, register it under `name`, set `alias`; returns the version.

    Safe to repeat: whatever an interrupted call has made for this run is resumed. An alias never goes back from a newer
    version, nor to one that was judged or rolled back. Raises UserError for a name MLflow refuses.
    """
    client = tracker.client()
    texts = _texts(contents, tags)
    found = version_of(client, name, tracker.run_id)
    if found is None:
        _create(client, name)
        model = client.get_logged_model(log_model(tracker, contents, tags))
        # Not models:/ID as source: MLflow would look it up in its global tracking store.
        place = model.artifact_location
        texts |= {checksums.TAG: record.unfolded(model.tags)[checksums.TAG]}
        found = client.create_model_version(name, place, tracker.run_id, record.folded(texts), model_id=model.model_id)
        reached("register")
        versions = json.dumps([{"name": name, "version": found.version}])
        client.set_logged_model_tags(model.model_id, {"mlflow.model.versions": versions})  # the page's link
    for key, text in record.folded(texts, found.tags).items():
        client.set_model_version_tag(name, found.version, key, text)
    number = str(found.version)
    if contents.description and not found.description:  # else the gate may have added its verdict
        client.update_model_version(name, number, _description(contents, f"models:/{name}/{number}"))
    _set_alias(Aliases(tracker.uri, name), alias, number)
    return int(number)


def log_model(tracker: Tracker, contents: Contents, tags: Mapping[str, object]) -> str:
    """Log `contents` as a model of the tracker's run without registering it; returns the logged model's id.

    Safe to repeat: a model that is there already is returned, one that was left pending is filled again.
    """
    from mlflow.entities import LoggedModelOutput

    client, run_id = tracker.client(), tracker.run_id
    experiment = client.get_run(run_id).info.experiment_id
    there = client.search_logged_models([experiment], f"source_run_id = '{run_id}' AND name = '{contents.name}'")
    if there and str(there[0].status) == "READY" and checksums.TAG in record.unfolded(there[0].tags):
        return str(there[0].model_id)
    texts = record.folded(_texts(contents, tags))
    model = there[0] if there else client.create_logged_model(experiment, contents.name, run_id, texts)
    outputs = client.get_run(run_id).outputs
    if model.model_id not in {item.model_id for item in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.log_model_artifacts(model.model_id, str(contents.folder), contents.place)
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        mlmodel.write(Path(folder), contents, model, run_id)
        text = checksums.of_folders({contents.place: contents.folder, "": Path(folder)})
        (Path(folder) / checksums.FILE).write_text(text, encoding="utf-8")
        client.log_model_artifacts(model.model_id, folder)
    texts = record.folded({**texts, checksums.TAG: checksums.digest(text)})
    note = {NOTE: _description(contents, f"models:/{model.model_id}")} if contents.description else {}
    client.set_logged_model_tags(model.model_id, texts | note)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def version_of(client: "MlflowClient", name: str, run_id: str) -> "ModelVersion | None":
    """The version of `name` that an MLflow run has registered."""
    found = client.search_model_versions(f"run_id = '{run_id}'")
    return next((item for item in found if item.name == name), None)


def _set_alias(aliases: Aliases, alias: str, number: str) -> None:
    """Let the alias name the version, unless that would undo what was done since the version was registered."""
    aliases.repair()  # a promotion that was cut off behind the alias has its verdict to come
    now = aliases.current().get(alias)
    verdict = aliases.version(number).tags.get(GATE)
    if alias == CHAMPION and verdict is not None:
        if now != number:
            logger.info(
                f"version {number} does not become {alias} by being registered again, it has a verdict: {verdict}"
            )
    elif now is not None and int(now) > int(number):
        logger.info(f"{alias} stays version {now}, which is newer than version {number}")
    elif alias == CHAMPION:  # `previous` follows, and a gate that decides now decides again
        aliases.promote(number, "registered with registry.alias=champion")
    else:
        aliases.client.set_registered_model_alias(aliases.name, alias, number)


def _texts(contents: Contents, tags: Mapping[str, object]) -> dict[str, str]:
    """The tags as texts, without those that say nothing."""
    found = {key: str(value) for key, value in tags.items() if str(value)}
    return found | ({EXPORT: ADAPTER_ONLY} if contents.base else {})


def _description(contents: Contents, uri: str) -> str:
    return contents.description.replace("{uri}", uri)[:DESCRIPTION_LENGTH]


def _create(client: "MlflowClient", name: str) -> None:
    """Make the registered model, if it is not there; raises UserError for a name that MLflow refuses."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=ABOUT)
    except MlflowException as error:
        if is_unavailable(error):
            raise
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise UserError(f"registry.model={name}: {first_line(error)}") from None
