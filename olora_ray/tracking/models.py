"""Versions of registered MLflow models: a merged folder or an adapter is written as one, and found again by its name.

The weights go from the folder to the artifact store in one copy, and no model is loaded. What is logged:

    MLmodel, requirements.txt, python_env.yaml, input_example.json     mlmodel.py
    model/                   the merged folder; or
    peft/                    the adapter's folder, of an adapter-only version
    components/tokenizer/    its tokenizer files again, where the flavour looks for them
    checksums.json           size and SHA-256 of all of these; see checksums.py
"""

import json
import logging
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from olora_ray.common import storage
from olora_ray.common.errors import UserError, first_line
from olora_ray.common.fault_points import reached
from olora_ray.config.schema import AnyConfig
from olora_ray.tracking import checksums, start
from olora_ray.tracking.aliases import CHAMPION, GATE, Aliases
from olora_ray.tracking.checksums import SETTINGS, Version, name_filter
from olora_ray.tracking.client import connect, is_unavailable, reachable
from olora_ray.tracking.run import Tracker
from olora_ray.tracking.start import resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model

logger = logging.getLogger(__name__)

# Contents of a version: which folder is registered, and what is said of it.


ADAPTER_ONLY = "adapter only"
"""Value of the tag EXPORT of a version that needs its base model to be loaded."""
EXPORT = "olora.export"
MODEL_PLACE, ADAPTER_PLACE = "model", "peft"
"""Where a merged model and an adapter lie in a logged model; MLflow's own names."""


@dataclass(frozen=True)
class BaseOfAdapter:
    """The base model that an adapter-only version stands on, as the version keeps it."""

    name: str
    """As a config names it: hub id, path, package://, s3://, models:/NAME/VERSION."""
    digest: str
    """Of all its files that decide what it computes (model/folder.py)."""
    folder: str
    """Where it lies on the machines of this cluster."""
    revision: str | None = None
    """Of a hub id: the commit."""
    on_hub: bool = False
    """Whether the name is a hub id under which anybody finds the model and the adapter's own tokenizer."""


@dataclass(frozen=True)
class Contents:
    """What is logged as one model."""

    folder: Path
    """A merged model, or an adapter in PEFT's form with tokenizer."""
    base: BaseOfAdapter | None = None
    """Of an adapter; None: the folder is a merged model."""
    answers_as: str = ""
    """What the model's answers name as their model when it is served."""
    description: str = ""
    """Markdown for the page of the version, or of the logged model; {uri} stands for its models:/ address."""
    example: Mapping[str, Any] | None = None
    """Input example: a request to the served model; None: one that says hello."""

    @property
    def name(self) -> str:
        """Name of the logged model in its run."""
        return "merged" if self.base is None else "adapter"

    @property
    def place(self) -> str:
        """Where the folder lies in the logged model."""
        return MODEL_PLACE if self.base is None else ADAPTER_PLACE


# The files that MLflow reads beside a model: MLmodel, requirements, tokenizer, input example.


FILE = "MLmodel"
BASE = "base_model"
"""Key of an MLmodel's metadata: the fields of BaseOfAdapter."""
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_NOT_OF_A_TOKENIZER = ("adapter_config.json", "README.md")
_PACKAGES = ("mlflow", "torch", "transformers")
_HELLO = {"prompt": "Hello"}
_EXAMPLE, _SERVED = "input_example.json", "serving_input_example.json"


def write(folder: Path, contents: Contents, logged: "LoggedModel", run_id: str) -> None:
    """Write all files but the model itself into `folder`, the root of the logged model."""
    _write_tokenizer(folder / "components" / "tokenizer", contents)
    packages = (*_PACKAGES, *(("peft",) if contents.base else ()))
    lines = [f"{name}=={installed(name).partition('+')[0]}" for name in packages]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    env = {"python": platform.python_version(), "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(json.dumps(env) + "\n", encoding="utf-8")  # JSON is YAML
    model = _mlmodel(contents, logged, run_id)
    model.saved_input_example_info = _write_example(folder, contents)
    model.save(str(folder / FILE))


def check_adapter_only() -> None:
    """Raise UserError if this MLflow cannot load an adapter whose base is a folder: it can since spring 2026."""
    from mlflow.transformers.flavor_config import FlavorKey

    if not hasattr(FlavorKey, "MODEL_LOCAL_BASE"):
        raise UserError(
            f"export.merged: MLflow {installed('mlflow')} loads no adapter on a base folder; install a newer one, or"
            " leave export.merged at true"
        )


def has_chat_template(folder: Path) -> bool:
    """Whether the folder's tokenizer has a chat template: served as a chat, else as completions.

    chat_template.json is a processor's, of pictures and text: no tokenizer reads it.
    """
    settings = folder / "tokenizer_config.json"
    inside = settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    return inside or (folder / "chat_template.jinja").is_file()


def _write_tokenizer(tokenizer: Path, contents: Contents) -> None:
    tokenizer.mkdir(parents=True)
    for file in contents.folder.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in _NOT_OF_A_TOKENIZER:
            shutil.copyfile(file, tokenizer / file.name)
    if contents.base:  # transformers asks it for the class of a tokenizer that does not name its own
        shutil.copyfile(_config(contents), tokenizer / "config.json")


def _write_example(folder: Path, contents: Contents) -> dict[str, str]:
    """An input example, as MLflow's _save_example writes it; returns what the MLmodel says of it."""
    hello = {"messages": [{"role": "user", "content": "Hello"}]} if has_chat_template(contents.folder) else _HELLO
    example = contents.example or {**hello, "max_tokens": 64}
    (folder / _EXAMPLE).write_text(json.dumps(example), encoding="utf-8")
    (folder / _SERVED).write_text(json.dumps(example, indent=2), encoding="utf-8")
    return {"artifact_path": _EXAMPLE, "type": "json_object", "serving_input_path": _SERVED}


def _mlmodel(contents: Contents, logged: "LoggedModel", run_id: str) -> "Model":
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import llm

    chat = has_chat_template(contents.folder)
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
        metadata={"task": task} | ({BASE: asdict(contents.base)} if contents.base else {}),
        model_size_bytes=sum(file.stat().st_size for file in contents.folder.rglob("*") if file.is_file()),
    )
    model.add_flavor(
        "transformers",
        transformers_version=installed("transformers"),
        code=None,
        task="text-generation",
        instance_type="TextGenerationPipeline",
        inference_task=task,
        components=["tokenizer"],
        tokenizer_type="AutoTokenizer",
        **_of_the_model(contents),
    )
    pyfunc.add_to_model(model, loader_module="mlflow.transformers", python_env="python_env.yaml")
    return model


def _of_the_model(contents: Contents) -> dict[str, str]:
    """The fields of the flavour that say what is loaded, and from where."""
    config: dict[str, Any] = json.loads(_config(contents).read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = {
        "pipeline_model_type": _class(config),
        "torch_dtype": f"torch.{dtype}",
        "source_model_name": contents.answers_as,
    }
    if (base := contents.base) is None:
        return {**found, "model_binary": contents.place}
    found["peft_adaptor"] = contents.place
    if base.on_hub and base.revision:
        hub = {"source_model_name": base.name, "source_model_revision": base.revision}
        return {**found, **hub, "tokenizer_name": base.name, "tokenizer_revision": base.revision}
    return {**found, "local_base_model_path": base.folder}


def _class(config: dict[str, Any]) -> str:
    """The class that AutoModelForCausalLM gives; some folders name the headless model as their architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""))
    own: list[str] = config.get("architectures") or []
    # Code that comes with the model has a class of its own under a type that transformers may know too.
    return str(own[0] if own and ("auto_map" in config or not isinstance(known, str)) else known)


def _config(contents: Contents) -> Path:
    return (Path(contents.base.folder) if contents.base else contents.folder) / "config.json"


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

    Safe to repeat: whatever an interrupted call has made for this run, with these settings, is resumed. An alias never
    goes back from a newer version, nor to one that was judged or rolled back. Raises UserError for a name that MLflow
    refuses.
    """
    client = tracker.client()
    texts = _texts(contents, tags)
    versions = client.search_model_versions(f"run_id = '{tracker.run_id}'")
    found = next((each for each in versions if each.name == name and _is_of(each, texts)), None)
    if found is None:
        _create(client, name)
        model = client.get_logged_model(log_model(tracker, contents, tags))
        # Not models:/ID as source: MLflow would look it up in its global tracking store.
        place = model.artifact_location
        texts |= {checksums.TAG: model.tags[checksums.TAG]}
        found = client.create_model_version(name, place, tracker.run_id, texts, model_id=model.model_id)
        reached("register")
        link = json.dumps([{"name": name, "version": found.version}])
        client.set_logged_model_tags(model.model_id, {"mlflow.model.versions": link})  # the page's link
    for key, text in texts.items():
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
    texts = _texts(contents, tags)
    of_run = client.search_logged_models([experiment], f"source_run_id = '{run_id}' AND name = '{contents.name}'")
    there = [each for each in of_run if _is_of(each, texts)]
    if there and str(there[0].status) == "READY" and checksums.TAG in there[0].tags:
        return str(there[0].model_id)
    model = there[0] if there else client.create_logged_model(experiment, contents.name, run_id, texts)
    outputs = client.get_run(run_id).outputs
    if model.model_id not in {item.model_id for item in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.log_model_artifacts(model.model_id, str(contents.folder), contents.place)
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        write(Path(folder), contents, model, run_id)
        text = checksums.of_folders({contents.place: contents.folder, "": Path(folder)})
        (Path(folder) / checksums.FILE).write_text(text, encoding="utf-8")
        client.log_model_artifacts(model.model_id, folder)
    texts |= {checksums.TAG: storage.digest(text)}
    note = {NOTE: _description(contents, f"models:/{model.model_id}")} if contents.description else {}
    client.set_logged_model_tags(model.model_id, texts | note)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


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


def _is_of(made: "ModelVersion | LoggedModel", texts: Mapping[str, str]) -> bool:
    """True if a version or logged model of a run was made with the settings in `texts`."""
    return bool(made.tags.get(SETTINGS) == texts.get(SETTINGS))


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


# Verdicts on a version in its description: what the gate and people have decided, for the readers of MLflow's page.


HEADING = "### Verdicts"
_LONGEST = 2000
"""Characters of all verdicts on a version; of more the latest are kept."""


def add(tracking_uri: str, name: str, number: str, line: str) -> None:
    """Add a line to a version's description, unless it is the last already; raises TrackingUnavailable."""
    with reachable(tracking_uri):
        client = connect(tracking_uri)
        text = client.get_model_version(name, number).description or ""
        client.update_model_version(name, number, with_line(text, line))


def with_line(description: str, line: str) -> str:
    """The description with one more verdict at its end."""
    body, _, verdicts = description.partition(HEADING)
    lines = [each for each in verdicts.split("\n") if each]
    new = "- " + " ".join(line.split())[:_LONGEST]
    if lines[-1:] != [new]:
        lines.append(new)
    while sum(map(len, lines)) + len(lines) > _LONGEST and len(lines) > 1:
        del lines[0]
    section = "\n".join([HEADING, "", *lines])
    return f"{body.rstrip()[: DESCRIPTION_LENGTH - len(section) - 2]}\n\n{section}".lstrip()


# From models:/NAME@ALIAS or models:/NAME/VERSION to files on this machine, checked against their checksums.


SCHEME = "models:/"
_BASE = TypeAdapter(BaseOfAdapter)


@dataclass(frozen=True)
class Registered:
    """A version of a registered model on this machine."""

    version: Version
    folder: Path
    """With config.json and safetensors; of an adapter-only version the adapter in PEFT's form, with tokenizer."""
    base: BaseOfAdapter | None
    """Of an adapter-only version."""


def find(uri: str, tracking_uri: str, cache: Path) -> Registered:
    """The version that `uri` names.

    Where the artifacts lie on this machine's disks its folder is they themselves; else they are downloaded
    once into `cache`. Raises UserError for a name, alias or version that is not
    there, with those that are, and for files that are not those of its registration.
    """
    with reachable(tracking_uri, upload=True):
        version = Version.of(_resolve(connect(tracking_uri), uri))
        place = str(connect(tracking_uri).get_model_version_download_uri(version.name, version.number))
        return _inside(uri, version, _checked(version, place, tracking_uri, cache))


def of_config(config: AnyConfig) -> Registered | None:
    """The registered version that a config names as its model (models:/...) in this run's MLflow; else None."""
    if not config.model.name.startswith(SCHEME):
        return None
    start.follow(config.run.storage)
    return find(config.model.name, resolve_uri(config), cache_folder(config))


def cache_folder(config: AnyConfig) -> Path:
    """Return the folder for copies of registered models: under the storage, so that the workers see them too."""
    place = config.run.storage
    return (Path.home() / ".cache" / "olora_ray" if storage.is_uri(place) else Path(place)) / "models"


def pinned(name: str, config: AnyConfig) -> str:
    """The name of a base, of models:/NAME@ALIAS that of the version: an alias moves.

    If it has moved since the base was opened the name is wrong, and who follows it sees that by the digest.
    """
    if not name.startswith(SCHEME) or "@" not in name:
        return name
    with reachable(resolve_uri(config)):
        version = Version.of(_resolve(connect(resolve_uri(config)), name))
    return f"{SCHEME}{version.name}/{version.number}"


def _checked(version: Version, place: str, tracking_uri: str, cache: Path) -> Path:
    copy = cache / storage.digest(tracking_uri, place, length=16)
    folder = _fetch(place, tracking_uri, copy)
    try:
        _verify(version, folder, tracking_uri)
    except UserError:
        if folder != copy:
            raise
        storage.remove(str(copy))  # is it the copy alone that is damaged?
        folder = _fetch(place, tracking_uri, copy)
        _verify(version, folder, tracking_uri)
    return folder


def _inside(uri: str, version: Version, folder: Path) -> Registered:
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return Registered(version, candidate, None)
    if not (folder / ADAPTER_PLACE / "adapter_config.json").is_file():
        raise UserError(f"model.name: {uri} is registered, but has no config.json: it is not a transformers model")
    return Registered(version, folder / ADAPTER_PLACE, _base(uri, folder))


def _base(uri: str, folder: Path) -> BaseOfAdapter:
    from mlflow.models import Model

    try:
        return _BASE.validate_python((Model.load(str(folder / FILE)).metadata or {})[BASE])
    except Exception:  # others may have written anything
        raise UserError(
            f"model.name: {uri} is an adapter that was registered by something else, so its base model cannot be"
            " checked; register it with this project, or merged into its base"
        ) from None


def _verify(version: Version, folder: Path, tracking_uri: str) -> None:
    if checksums.TAG in version.tags:
        checksums.verify(version, str(folder), tracking_uri)
    else:
        logger.warning(
            f"model.name: {version.name} version {version.number} was registered by something else and has no"
            " checksums: its files are not checked"
        )


def _resolve(client: "MlflowClient", uri: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    words = uri.removeprefix(SCHEME).strip("/")
    name, at, alias = words.partition("@")
    if not at:
        name, _, number = words.rpartition("/")
    if not uri.startswith(SCHEME) or not name or not (alias if at else number.isdigit()):
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
