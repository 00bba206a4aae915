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
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olora_ray.common.errors import UserError, first_line
from olora_ray.common.fault_points import reached
from olora_ray.tracking import checksums
from olora_ray.tracking.aliases import CHAMPION, GATE, Aliases
from olora_ray.tracking.client import connect, is_unavailable, reachable
from olora_ray.tracking.run import Tracker

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
    """Of all its files that decide what it computes (model/identity.py)."""
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
        texts |= {checksums.TAG: checksums.unfolded(model.tags)[checksums.TAG]}
        found = client.create_model_version(
            name, place, tracker.run_id, checksums.folded(texts), model_id=model.model_id
        )
        reached("register")
        versions = json.dumps([{"name": name, "version": found.version}])
        client.set_logged_model_tags(model.model_id, {"mlflow.model.versions": versions})  # the page's link
    for key, text in checksums.folded(texts, found.tags).items():
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
    if there and str(there[0].status) == "READY" and checksums.TAG in checksums.unfolded(there[0].tags):
        return str(there[0].model_id)
    texts = checksums.folded(_texts(contents, tags))
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
    texts = checksums.folded({**texts, checksums.TAG: checksums.digest(text)})
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
