"""Versions of registered MLflow models: writing a merged folder or an adapter as one, and reading it by its name.

The weights are copied once, from the folder to the artifact store, and no model is loaded. Logged are:

    MLmodel, requirements.txt, python_env.yaml, input_example.json
    model/                   the merged folder; or
    peft/                    the adapter's folder, of an adapter-only version
    components/tokenizer/    its tokenizer files again, where MLflow's transformers flavour reads them
    checksums.json           size and SHA-256 of all of these; see checksums.py
"""

import contextlib
import json
import logging
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as installed
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError, first_line
from olora_ray.common.fault_points import reached
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.tracking import checksums, start
from olora_ray.tracking.aliases import CHAMPION, Aliases
from olora_ray.tracking.checksums import ADAPTER_ONLY, EXPORT, SETTINGS, Version, name_filter
from olora_ray.tracking.client import connect, existing, is_unavailable, reachable, refused
from olora_ray.tracking.moved_storage import advice
from olora_ray.tracking.run import PARAM_LENGTH, Tracker
from olora_ray.tracking.start import resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model

logger = logging.getLogger(__name__)

# Contents of a version: the registered folder, and its description.

# Folders of a merged model and of an adapter in a logged model. The names are MLflow's.
MODEL_FOLDER = "model"
ADAPTER_FOLDER = "peft"


@dataclass(frozen=True)
class BaseOfAdapter:
    """The base model of an adapter-only version, as the version stores it."""

    name: str
    """Name for a config: hub id, path, package://, s3://, models:/NAME/VERSION."""
    digest: str
    """Digest of all files that decide the model's results (model/folder.py)."""
    folder: str
    """Its folder on the machines of this cluster."""
    revision: str | None = None
    """The commit of a hub id."""
    on_hub: bool = False
    """True if the name is a hub id with the model and the adapter's own tokenizer."""


@dataclass(frozen=True)
class Contents:
    folder: Path
    """A merged model, or an adapter in PEFT's format, with its tokenizer."""
    base: BaseOfAdapter | None = None
    """The adapter's base model; None: the folder is a merged model."""
    answers_as: str = ""
    """The served model's name in its answers."""
    system: str | None = None
    """The system message of all training rows, if they have the same."""
    description: str = ""
    """Markdown for the page of the version or the logged model; {uri} stands for its models:/ address."""
    params: Mapping[str, object] = field(default_factory=dict)
    measured: Sequence[tuple[int, Sequence[str], tuple[str, str]]] = ()
    """Metrics of the run that hold for the model, too: step, names, and name and digest of their dataset."""

    @property
    def name(self) -> str:
        return "merged" if self.base is None else "adapter"

    @property
    def artifact_folder(self) -> str:
        return MODEL_FOLDER if self.base is None else ADAPTER_FOLDER

    @property
    def config(self) -> Path:
        """The config.json of the base model."""
        folder = self.folder if self.base is None else Path(self.base.folder)
        return folder / "config.json"


# The files that MLflow reads beside a model: MLmodel, requirements, tokenizer, input example.


FILE = "MLmodel"
# Key in an MLmodel's metadata, with the fields of BaseOfAdapter.
BASE = "base_model"
# Key in an MLmodel's metadata. No tag: a signature covers the MLmodel, and the data may be gone when it is needed.
SYSTEM = "system_message"
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_NOT_OF_A_TOKENIZER = ("adapter_config.json", "README.md")
_PACKAGES = ("mlflow", "torch", "transformers")
_EXAMPLE = "input_example.json"
_SERVED = "serving_input_example.json"


def write_model(folder: Path, contents: Contents, logged: "LoggedModel", run_id: str) -> None:
    """Write all files except the model itself into `folder`, the root of the logged model."""
    _write_tokenizer(folder / "components" / "tokenizer", contents)
    packages = [*_PACKAGES]
    if contents.base:
        packages.append("peft")
    lines = [f"{name}=={installed(name).partition('+')[0]}\n" for name in packages]
    (folder / "requirements.txt").write_text("".join(lines), encoding="utf-8")
    env = {
        "python": platform.python_version(),
        "build_dependencies": ["pip"],
        "dependencies": ["-r requirements.txt"],
    }
    # JSON is YAML.
    (folder / "python_env.yaml").write_text(json.dumps(env) + "\n", encoding="utf-8")
    # A request to the served model, which MLflow shows on the version's page.
    example: dict[str, Any] = {"prompt": "Hello", "max_tokens": 64}
    if has_chat_template(contents.folder):
        example = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
    (folder / _EXAMPLE).write_text(json.dumps(example), encoding="utf-8")
    (folder / _SERVED).write_text(json.dumps(example, indent=2), encoding="utf-8")
    model = _mlmodel(contents, logged, run_id)
    model.saved_input_example_info = {
        "artifact_path": _EXAMPLE,
        "type": "json_object",
        "serving_input_path": _SERVED,
    }
    model.save(str(folder / FILE))


def has_chat_template(folder: Path) -> bool:
    """True if the folder's tokenizer has a chat template: then the model is served as a chat, else as completions."""
    # chat_template.json does not count: it belongs to processors of images and text, and no tokenizer reads it.
    settings = folder / "tokenizer_config.json"
    stored = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    return bool(stored.get("chat_template")) or (folder / "chat_template.jinja").is_file()


def _write_tokenizer(tokenizer: Path, contents: Contents) -> None:
    tokenizer.mkdir(parents=True)
    for file in contents.folder.iterdir():
        other = file.name.endswith(_WEIGHTS) or file.name in _NOT_OF_A_TOKENIZER
        if file.is_file() and not other:
            shutil.copyfile(file, tokenizer / file.name)
    # transformers reads the tokenizer's class there if the tokenizer does not name it.
    if contents.base:
        shutil.copyfile(contents.config, tokenizer / "config.json")


def _mlmodel(contents: Contents, logged: "LoggedModel", run_id: str) -> "Model":
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import llm

    if has_chat_template(contents.folder):
        task = "llm/v1/chat"
        signature = ModelSignature(llm.CHAT_MODEL_INPUT_SCHEMA, llm.CHAT_MODEL_OUTPUT_SCHEMA)
    else:
        task = "llm/v1/completions"
        signature = ModelSignature(
            llm.COMPLETIONS_MODEL_INPUT_SCHEMA, llm.COMPLETIONS_MODEL_OUTPUT_SCHEMA
        )
    metadata: dict[str, Any] = {"task": task, SYSTEM: contents.system}
    if contents.base:
        metadata[BASE] = asdict(contents.base)
    model = Model(
        artifact_path=logged.artifact_location,
        run_id=run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        signature=signature,
        metadata=metadata,
        model_size_bytes=sum(
            file.stat().st_size for file in contents.folder.rglob("*") if file.is_file()
        ),
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
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config: dict[str, Any] = json.loads(contents.config.read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    # Not simply the folder's `architectures`: some folders name the model without its head there.
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""))
    own = config.get("architectures")
    # A model with its own code may use a model_type that transformers knows, but has its own class.
    if own and ("auto_map" in config or not isinstance(model_class, str)):
        model_class = own[0]
    fields = {
        "pipeline_model_type": str(model_class),
        "torch_dtype": f"torch.{dtype}",
        "source_model_name": contents.answers_as,
    }
    base = contents.base
    if base is None:
        fields["model_binary"] = contents.artifact_folder
        return fields
    fields["peft_adaptor"] = contents.artifact_folder
    if base.on_hub and base.revision:
        hub = {"source_model_name": base.name, "source_model_revision": base.revision}
        return {**fields, **hub, "tokenizer_name": base.name, "tokenizer_revision": base.revision}
    return {**fields, "local_base_model_path": base.folder}


# Tag that MLflow shows as the description of a run or a logged model.
NOTE = "mlflow.note.content"
# Limit of MLflow's column for versions and models. PostgreSQL and MySQL enforce it.
DESCRIPTION_LENGTH = 5000
ABOUT = """olora_ray trained the versions of this model. The description of each version has its training data, its\
 results, and how to load it.

- `champion`: the version in use
- `previous`: the champion before it; a rollback returns to it
- `challenger`: the newest retrained version, if it has not passed the gate
"""


def register(
    tracker: Tracker,
    contents: Contents,
    name: str,
    alias: str,
    tags: Mapping[str, object],
    key: str | None = None,
    verify: str | None = None,
) -> int:
    """Log `contents` as a model of the tracker's run, register it under `name`, set `alias`; return the version.

    `key` signs it. `verify` is the public key whose signature is a condition of becoming the champion.
    Safe to repeat: a registration of this run with the same settings is resumed. An alias never moves from a newer to
    an older version, nor to a version that was judged or rolled back. Raises UserError for a name that MLflow refuses.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    client = tracker.client()
    texts = _texts(contents, tags)
    versions = client.search_model_versions(f"run_id = '{tracker.run_id}'")
    version = next((each for each in versions if each.name == name and _is_of(each, texts)), None)
    if version is None:
        _create(client, name)
        model = client.get_logged_model(log_model(tracker, contents, tags))
        # Not models:/ID as source: MLflow would look it up in its global tracking store.
        location = model.artifact_location
        texts |= {checksums.TAG: model.tags[checksums.TAG]}
        version = client.create_model_version(
            name, location, tracker.run_id, texts, model_id=model.model_id
        )
        reached("register")
        link = json.dumps([{"name": name, "version": version.version}])
        # For the link on the page.
        client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: link})
    for tag, text in texts.items():
        client.set_model_version_tag(name, version.version, tag, text)
    number = str(version.version)
    # An existing description may have been edited by hand.
    if contents.description and not version.description:
        text = _description(contents, f"models:/{name}/{number}")
        client.update_model_version(name, number, text)
    aliases = Aliases(tracker.uri, name, verify)
    if key:
        aliases.sign(number, key)
    _set_alias(aliases, alias, number)
    return int(number)


def log_model(tracker: Tracker, contents: Contents, tags: Mapping[str, object]) -> str:
    """Log `contents` as a model of the tracker's run without registering it; return the logged model's id.

    Safe to repeat: a complete model is returned as it is, a pending one is filled again.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = tracker.client()
    run_id = tracker.run_id
    experiment = client.get_run(run_id).info.experiment_id
    texts = _texts(contents, tags)
    of_run = client.search_logged_models(
        [experiment], f"source_run_id = '{run_id}' AND name = '{contents.name}'"
    )
    model = next((each for each in of_run if _is_of(each, texts)), None)
    if model is not None and str(model.status) == "READY" and checksums.TAG in model.tags:
        return str(model.model_id)
    if model is None:
        params = {name: str(value)[:PARAM_LENGTH] for name, value in contents.params.items()}
        # Such as llama, in config.json and in MLflow.
        model_type = json.loads(contents.config.read_text(encoding="utf-8")).get("model_type")
        model = client.create_logged_model(
            experiment, contents.name, run_id, texts, params, model_type
        )
    outputs = client.get_run(run_id).outputs
    if model.model_id not in {item.model_id for item in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    # Not the client's `log_model_artifacts`: older versions know no folder of a model, and only the global address.
    files = get_artifact_repository(model.artifact_location, tracking_uri=tracker.uri)
    files.log_artifacts(str(contents.folder), contents.artifact_folder)
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        write_model(Path(folder), contents, model, run_id)
        text = checksums.of_folders({contents.artifact_folder: contents.folder, "": Path(folder)})
        (Path(folder) / checksums.FILE).write_text(text, encoding="utf-8")
        files.log_artifacts(folder)
    for step, names, dataset in contents.measured:
        tracker.of_model(model.model_id, step, names, dataset)
    texts[checksums.TAG] = storage.digest(text)
    if contents.description:
        texts[NOTE] = _description(contents, f"models:/{model.model_id}")
    client.set_logged_model_tags(model.model_id, texts)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def of_run(tracking_uri: str, run_id: str) -> str | None:
    """Return the id of the newest model that an MLflow run has logged; None if there is no such model or run."""
    found = logged_by(tracking_uri, run_id)
    newest = max(found, key=lambda model: model.creation_timestamp, default=None)
    return None if newest is None else newest.model_id


def logged_by(tracking_uri: str, run_id: str) -> "Sequence[LoggedModel]":
    """Return the models that an MLflow run has logged; none if there is no such run."""
    client = connect(tracking_uri)
    with reachable(tracking_uri):
        run = existing(client.get_run, run_id)
        if run is None:
            return ()
        return client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")


def _set_alias(aliases: Aliases, alias: str, number: str) -> None:
    """Set the alias, unless that would undo a change made since the version was registered."""
    aliases.repair()  # an interrupted promotion may have set the alias, but not yet the verdict
    now = aliases.current().get(alias)
    verdict = aliases.version(number).verdict
    if alias == CHAMPION and verdict:
        if now != number:
            logger.info(
                f"version {number} is registered again, but does not become {alias}, because of its verdict: {verdict}"
            )
    elif now is not None and int(now) > int(number):
        logger.info(f"{alias} stays version {now}, which is newer than version {number}")
    elif alias == CHAMPION:  # sets `previous` too, and makes a concurrent gate decide again
        aliases.promote(number, "registered with registry.alias=champion")
    else:
        aliases.client.set_registered_model_alias(aliases.name, alias, number)


def _is_of(made: "ModelVersion | LoggedModel", texts: Mapping[str, str]) -> bool:
    return bool(made.tags.get(SETTINGS) == texts.get(SETTINGS))


def _texts(contents: Contents, tags: Mapping[str, object]) -> dict[str, str]:
    texts = {key: str(value) for key, value in {**start.lineage(), **tags}.items() if str(value)}
    if contents.base:
        texts[EXPORT] = ADAPTER_ONLY
    return texts


def _description(contents: Contents, uri: str) -> str:
    return contents.description.replace("{uri}", uri)[:DESCRIPTION_LENGTH]


def _create(client: "MlflowClient", name: str) -> None:
    """Create the registered model if it is missing; raise UserError for a name that MLflow refuses."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=ABOUT)
    except MlflowException as error:
        if is_unavailable(error):
            raise
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise UserError(f"registry.model={name}: {first_line(error)}") from None


# From models:/NAME@ALIAS or models:/NAME/VERSION to local files, checked against their checksums.

SCHEME = "models:/"


def uri_of(name: str) -> str | None:
    """Return the models:/ address of a version that a person names, as NAME@ALIAS or NAME@VERSION; else None."""
    model, _, which = name.removeprefix(SCHEME).partition("@")
    if not which or "/" in model:
        return None
    if which.isdigit():
        return f"{SCHEME}{model}/{which}"
    return f"{SCHEME}{model}@{which}"


_BASE = TypeAdapter(BaseOfAdapter)


@dataclass(frozen=True)
class Registered:
    version: Version
    folder: Path
    """The model with config.json and safetensors, or the adapter in PEFT's format; with the tokenizer."""
    base: BaseOfAdapter | None
    """The base model of an adapter-only version."""
    model_id: str | None = None
    """The logged model that it is a version of, if it is one."""
    system: str | None = None
    """The system message of all its training rows; None also in versions of older releases."""


def find(uri: str, tracking_uri: str, cache: Path, verify: str | None = None) -> Registered:
    """Return the version that `uri` names, with its files (see `fetch`).

    Raises UserError for an unknown name, alias or version, with the known ones.
    """
    return fetch(resolve(uri, tracking_uri, verify), tracking_uri, cache)


def resolve(uri: str, tracking_uri: str, verify: str | None = None) -> Version:
    """Return the version that `uri` names; it must be signed if there is a public key `verify`.

    Raises UserError for an unknown one, for one that was changed after its verdict, and for a champion without one.
    """
    from mlflow.exceptions import MlflowException

    words = uri.removeprefix(SCHEME).strip("/")
    name, at, alias = words.partition("@")
    number = ""
    if not at:
        name, _, number = words.rpartition("/")
    if not uri.startswith(SCHEME) or not name or not (alias or number.isdigit()):
        raise UserError(f"model.name: {uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    client = connect(tracking_uri)
    with reachable(tracking_uri):
        try:
            if alias:
                version = Version.of(client.get_model_version_by_alias(name, alias), verify)
            else:
                version = Version.of(client.get_model_version(name, number), verify)
            version.refuse_changed()
            if alias == CHAMPION:
                Aliases(tracking_uri, name).refuse_unjudged(version)
            return version
        except MlflowException as error:
            if is_unavailable(error):
                raise
        model = existing(client.get_registered_model, name)
        if model is None:
            raise UserError(
                f"model.name: {uri}: no model {name!r} is registered in the tracking server"
            )
        numbers = [str(each.version) for each in client.search_model_versions(name_filter(name))]
    aliases = [f"@{each} = {version}" for each, version in model.aliases.items()]
    raise UserError(
        f"model.name: {uri}: not registered; {name} has versions {', '.join(sorted(numbers, key=int)) or 'none'} and"
        f" aliases {', '.join(aliases) or 'none'}"
    )


def fetch(version: Version, tracking_uri: str, cache: Path, copy: bool = False) -> Registered:
    """Return the files of a version, which are checked against their checksums at each call.

    Artifacts on a local disk are used directly, unless `copy` is set; others are downloaded once into `cache`. Raises
    UserError for a version that was changed after the registration or the verdict, or lacks a signature that it needs.
    """
    with reachable(tracking_uri, upload=True):
        place = str(
            connect(tracking_uri).get_model_version_download_uri(version.name, version.number)
        )
        uri = f"{SCHEME}{version.name}/{version.number}"
        return _inside(uri, version, _checked(version, place, tracking_uri, cache, copy))


def of_config(config: AnyConfig) -> Registered | None:
    """Return the registered version that a config names as its model (models:/...); else None."""
    if not config.model.name.startswith(SCHEME):
        return None
    verify = config.registry.verify if isinstance(config, Config) else None
    return find(config.model.name, resolve_uri(config), cache_folder(config), verify)


def cache_folder(config: AnyConfig) -> Path:
    """Return the folder for copies of registered models: under the storage, where workers see it, too."""
    if storage.is_uri(config.run.storage):
        return Path.home() / ".cache" / "olora_ray" / "models"
    return Path(config.run.storage) / "models"


def pinned(name: str, config: AnyConfig) -> str:
    """Return the name of a base model with a version instead of an alias, because an alias may move."""
    if not name.startswith(SCHEME) or "@" not in name:
        return name
    # If the alias has moved since the base model was opened, this is the wrong version. Its digest shows that later.
    version = resolve(name, resolve_uri(config))
    return f"{SCHEME}{version.name}/{version.number}"


def _checked(version: Version, place: str, tracking_uri: str, cache: Path, always: bool) -> Path:
    copy = cache / storage.digest(tracking_uri, place, length=16)
    if always:  # a name for people, who see it in an engine's list of models
        copy = cache / f"{version.name}-{version.number}-{version.checksum[:16]}"
    folder = _fetch(place, tracking_uri, copy, always)
    try:
        _verify(version, folder, tracking_uri)
    except UserError:
        if folder != copy:
            raise
        storage.remove(str(copy))  # only the copy may be damaged: download it again
        folder = _fetch(place, tracking_uri, copy, always)
        _verify(version, folder, tracking_uri)
    return folder


def _inside(uri: str, version: Version, folder: Path) -> Registered:
    from mlflow.models import Model

    # From the MLmodel, because MLflow's registry of versions does not store these. Another program may have written
    # anything there.
    model_id = None
    base = None
    system = None
    with contextlib.suppress(Exception):
        model = Model.load(str(folder / FILE))
        model_id = model.model_id
        metadata = model.metadata or {}
        system = metadata.get(SYSTEM)
        base = _BASE.validate_python(metadata[BASE])
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return Registered(version, candidate, None, model_id, system)
    if not (folder / ADAPTER_FOLDER / "adapter_config.json").is_file():
        raise UserError(
            f"model.name: {uri} is registered, but has no config.json, so it is not a transformers model"
        )
    if base is None:
        raise UserError(
            f"model.name: {uri} is an adapter that another program registered, so its base model cannot be checked;"
            " register it with this project, or register the merged model"
        )
    return Registered(version, folder / ADAPTER_FOLDER, base, model_id, system)


def _verify(version: Version, folder: Path, tracking_uri: str) -> None:
    if version.checksum or version.judged or version.key:
        checksums.verify(version, str(folder), tracking_uri)
    else:
        logger.warning(
            f"model.name: {version.name} version {version.number} has no checksums, because another program"
            " registered it: its files are not checked"
        )


def _fetch(place: str, tracking_uri: str, target: Path, always: bool) -> Path:
    from mlflow.artifacts import download_artifacts

    local = Path(place.removeprefix("file://"))
    if local.is_absolute():
        if not local.is_dir():
            raise UserError(
                f"model.name: the registered model's folder {local} is missing on this machine"
                f"{advice(place, tracking_uri)}"
            )
        if not always:
            return local

    def download(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".olora-", dir=target.parent) as parts:
            files = download_artifacts(
                artifact_uri=place, dst_path=f"{parts}/files", tracking_uri=tracking_uri
            )
            Path(files).replace(folder)

    with refused(f"model.name: cannot download {place}"):
        return node_cache.cached(target, download)


def scripts() -> str:
    """Return the folder of the Python programs, for a shell: the user may not have activated the environment."""
    return quote(str(Path(sys.executable).parent))


def uses(store: str, uri: str) -> list[str]:
    """Return lines that load and serve a registered version; they work in any folder."""
    return [
        f"load:   mlflow.set_tracking_uri({json.dumps(store)}); mlflow.transformers.load_model({json.dumps(uri)})",
        # `mlflow models serve` starts its server by name, so PATH must contain the folder.
        f"serve:  PATH={scripts()}:$PATH MLFLOW_TRACKING_URI={quote(store)} mlflow models serve -m {quote(uri)}"
        " --env-manager local -p 5001",
    ]
