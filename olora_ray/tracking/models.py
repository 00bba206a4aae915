"""A merged folder as a version of a registered MLflow model, and back.

MLflow's own `transformers.log_model(FOLDER)` fails with recent transformers (it asks a string for its
`__name__` since `check_task` names classes instead of importing them) and copies the model to a
temporary folder first. So the MLmodel is written here, with MLflow's public classes: the flavours
`transformers` and `python_function` of a text-generation pipeline. The weights go from the folder to
the artifact store in one copy, and no model is loaded. What is logged:

    MLmodel, requirements.txt, python_env.yaml
    model/                   the merged folder
    components/tokenizer/    its tokenizer files again, where the flavour looks for them
    checksums.json           size and SHA-256 of all of these; see checksums.py
"""

import json
import logging
import platform
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olora_ray.common import storage
from olora_ray.common.digests import digest
from olora_ray.common.errors import UserError, first_line
from olora_ray.common.fault_points import reached
from olora_ray.config.evaluation import AnyConfig
from olora_ray.tracking import checksums
from olora_ray.tracking.aliases import CHAMPION, Aliases
from olora_ray.tracking.client import connect, is_unavailable, reachable
from olora_ray.tracking.run import Tracker
from olora_ray.tracking.start import resolve_uri
from olora_ray.tracking.version import Version, name_filter

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model

logger = logging.getLogger(__name__)

LOGGED_NAME = "merged"
"""Name of the logged model in its run."""
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_PACKAGES = ("mlflow", "torch", "transformers")


def register(
    tracker: Tracker, merged: Path, name: str, alias: str, tags: Mapping[str, object], *, base_name: str = ""
) -> int:
    """Log `merged` as a model of the tracker's run, register it under `name`, set `alias`; returns the version.

    Safe to repeat: whatever an interrupted call has made for this run is resumed. `base_name` is
    what the model's answers name as their model. Raises UserError for a name MLflow refuses.
    """
    from mlflow.exceptions import MlflowException

    client = tracker.client()
    texts = {key: str(value) for key, value in tags.items()}
    found = version_of(client, name, tracker.run_id)
    if found is None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if is_unavailable(error):
                raise
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise UserError(f"registry.model={name}: {first_line(error)}") from None
        model = client.get_logged_model(log_model(tracker, merged, tags, base_name=base_name or name))
        # Not models:/ID as source: MLflow would look it up in its global tracking store.
        place = model.artifact_location
        texts |= {checksums.TAG: model.tags[checksums.TAG]}
        found = client.create_model_version(name, place, tracker.run_id, texts, model_id=model.model_id)
        reached("register")
        versions = json.dumps([{"name": name, "version": found.version}])
        client.set_logged_model_tags(model.model_id, {"mlflow.model.versions": versions})  # the page's link
    for key, text in texts.items():
        client.set_model_version_tag(name, found.version, key, text)
    number = str(found.version)
    if alias == CHAMPION:  # `previous` follows, and a gate that decides now decides again
        Aliases(tracker.uri, name).promote(number, "registered with registry.alias=champion")
    else:
        client.set_registered_model_alias(name, alias, number)
    return int(number)


def log_model(tracker: Tracker, merged: Path, tags: Mapping[str, object], *, base_name: str = "") -> str:
    """Log `merged` as a model of the tracker's run without registering it; returns the logged model's id.

    Safe to repeat: a model that is there already is returned, one that was left pending is filled again.
    """
    from mlflow.entities import LoggedModelOutput

    client, run_id = tracker.client(), tracker.run_id
    experiment = client.get_run(run_id).info.experiment_id
    there = client.search_logged_models([experiment], f"source_run_id = '{run_id}' AND name = '{LOGGED_NAME}'")
    if there and str(there[0].status) == "READY" and checksums.TAG in there[0].tags:
        return str(there[0].model_id)
    texts = {key: str(value) for key, value in tags.items()}
    model = there[0] if there else client.create_logged_model(experiment, LOGGED_NAME, run_id, texts)
    outputs = client.get_run(run_id).outputs
    if model.model_id not in {item.model_id for item in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.log_model_artifacts(model.model_id, str(merged), "model")
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        _write_description(Path(folder), merged, model, run_id, base_name)
        text = checksums.of_folders({"model": merged, "": Path(folder)})
        (Path(folder) / checksums.FILE).write_text(text, encoding="utf-8")
        client.log_model_artifacts(model.model_id, folder)
    client.set_logged_model_tags(model.model_id, {checksums.TAG: checksums.digest(text)})
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def resolve_model_uri(uri: str, tracking_uri: str, cache: Path | None = None) -> Path:
    """The local folder with config.json and safetensors of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Where the artifacts lie on this machine's disks it is they themselves; else they are downloaded
    once into `cache` (~/.cache/olora_ray). Raises UserError for a name, alias or version that is not
    there, with those that are, and for files that are not those of its registration.
    """
    with reachable(tracking_uri, upload=True):
        return _found(uri, tracking_uri, cache)


def _found(uri: str, tracking_uri: str, cache: Path | None) -> Path:
    version = Version.of(_resolve(connect(tracking_uri), uri))
    place = str(connect(tracking_uri).get_model_version_download_uri(version.name, version.number))
    key = digest(tracking_uri, place, length=16)
    copy = (cache or Path.home() / ".cache" / "olora_ray") / "models" / key
    folder = _fetch(place, tracking_uri, copy)
    try:
        _verify(version, folder, tracking_uri)
    except UserError:
        if folder != copy:
            raise
        storage.remove(str(copy))  # is it the copy alone that is damaged?
        folder = _fetch(place, tracking_uri, copy)
        _verify(version, folder, tracking_uri)
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"model.name: {uri} is registered, but has no config.json: it is not a transformers model")


def _verify(version: Version, folder: Path, tracking_uri: str) -> None:
    if checksums.TAG in version.tags:
        checksums.verify(version, str(folder), tracking_uri)
    else:
        logger.warning(
            f"model.name: {version.name} version {version.number} was registered by something else and has no"
            " checksums: its files are not checked"
        )


def version_of(client: "MlflowClient", name: str, run_id: str) -> "ModelVersion | None":
    """The version of `name` that an MLflow run has registered."""
    found = client.search_model_versions(f"run_id = '{run_id}'")
    return next((item for item in found if item.name == name), None)


def _write_description(folder: Path, merged: Path, model: "LoggedModel", run_id: str, base_name: str) -> None:
    tokenizer = folder / "components" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for file in merged.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, tokenizer / file.name)
    packages = [f"{name}=={installed(name).partition('+')[0]}" for name in _PACKAGES]
    (folder / "requirements.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")
    env = {"python": platform.python_version(), "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(json.dumps(env) + "\n", encoding="utf-8")  # JSON is YAML
    _mlmodel(merged, model, run_id, base_name).save(str(folder / "MLmodel"))


def _mlmodel(merged: Path, logged: "LoggedModel", run_id: str, base_name: str) -> "Model":
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import llm

    config: dict[str, Any] = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    chat = has_chat_template(merged)
    task = "llm/v1/chat" if chat else "llm/v1/completions"
    signature = (
        ModelSignature(inputs=llm.CHAT_MODEL_INPUT_SCHEMA, outputs=llm.CHAT_MODEL_OUTPUT_SCHEMA)
        if chat
        else ModelSignature(inputs=llm.COMPLETIONS_MODEL_INPUT_SCHEMA, outputs=llm.COMPLETIONS_MODEL_OUTPUT_SCHEMA)
    )
    model = Model(
        artifact_path=logged.artifact_location,
        run_id=run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        signature=signature,
        metadata={"task": task},
        model_size_bytes=sum(file.stat().st_size for file in merged.rglob("*") if file.is_file()),
    )
    model.add_flavor(
        "transformers",
        transformers_version=installed("transformers"),
        code=None,
        task="text-generation",
        instance_type="TextGenerationPipeline",
        inference_task=task,
        pipeline_model_type=config["architectures"][0],
        source_model_name=base_name,
        model_binary="model",
        torch_dtype=f"torch.{config.get('dtype') or config.get('torch_dtype') or 'float32'}",
        components=["tokenizer"],
        tokenizer_type="AutoTokenizer",
    )
    pyfunc.add_to_model(model, loader_module="mlflow.transformers", python_env="python_env.yaml")
    return model


def has_chat_template(merged: Path) -> bool:
    """Whether the folder's tokenizer has a chat template: served as a chat, else as completions."""
    settings = merged / "tokenizer_config.json"
    inside = settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    return inside or any((merged / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))


def _resolve(client: "MlflowClient", uri: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    words = uri.removeprefix("models:/").strip("/")
    name, at, alias = words.partition("@")
    if not at:
        name, _, number = words.rpartition("/")
    if not uri.startswith("models:/") or not name or not (alias if at else number.isdigit()):
        raise UserError(f"model.name: {uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        return client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, number)
    except MlflowException as error:
        if is_unavailable(error):
            raise
        raise UserError(f"model.name: {uri}: {_what_there_is(client, name, error)}") from None


def _what_there_is(client: "MlflowClient", name: str, error: Exception) -> str:
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
        versions = [str(item.version) for item in client.search_model_versions(name_filter(name))]
    except MlflowException as missing:
        if missing.error_code == "RESOURCE_DOES_NOT_EXIST":
            return f"no model {name!r} is registered in the tracking server"
        return first_line(error)
    named = ", ".join(f"@{alias} = {version}" for alias, version in aliases.items()) or "none"
    return f"not registered; {name} has versions {', '.join(sorted(versions, key=int)) or 'none'} and aliases {named}"


def _fetch(place: str, tracking_uri: str, target: Path) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    local = Path(place.removeprefix("file://"))
    if local.is_absolute():
        if not local.is_dir():
            raise UserError(f"model.name: the registered model's files are not at {local} on this machine")
        return local
    if target.is_dir():
        return target
    try:
        with (
            storage.staged(target) as folder,
            tempfile.TemporaryDirectory(prefix=".olora-", dir=target.parent) as parts,
        ):
            downloads = str(Path(parts) / "files")
            Path(download_artifacts(artifact_uri=place, dst_path=downloads, tracking_uri=tracking_uri)).replace(folder)
    except (MlflowException, OSError) as error:
        if target.is_dir():  # another process of this node was faster
            return target
        if is_unavailable(error):
            raise
        raise UserError(f"model.name: cannot download {place}: {first_line(error)}") from None
    return target


def registered_folder(config: AnyConfig) -> Path | None:
    """The local folder of the base model if the config names one of this run's MLflow (models:/...); else None."""
    if not config.model.name.startswith("models:/"):
        return None
    # Under the storage, so that the workers see it too.
    cache = None if storage.is_uri(config.run.storage) else Path(config.run.storage)
    return resolve_model_uri(config.model.name, resolve_uri(config), cache)
