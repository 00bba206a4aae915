"""The files that MLflow reads beside a model: MLmodel, requirements, tokenizer, input example.

MLflow's own `transformers.log_model(FOLDER)` fails with recent transformers (it asks a string for its
`__name__` since `check_task` names classes instead of importing them), copies the model to a
temporary folder first, and of an adapter wants the model in memory. So the MLmodel is written here, with MLflow's
public classes: the flavours `transformers` and `python_function` of a text-generation pipeline. An adapter has its
base by reference, in one of the two ways that the flavour knows (mlflow/transformers/flavor_config.py):

    local_base_model_path                        the folder on this cluster; the tokenizer is the adapter's
    source_model_name + source_model_revision    hub id and commit; the tokenizer is the hub's too
"""

import json
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olora_ray.common.errors import UserError
from olora_ray.tracking.contents import Contents

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.models import Model

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
