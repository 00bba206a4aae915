"""Configs from YAML files and nested mappings, validated as a whole, and written back."""

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from olora_ray.common import secrets
from olora_ray.common.errors import Problems, UserError
from olora_ray.common.storage import digest_json
from olora_ray.config.schema import Config, EvaluationConfig
from olora_ray.config.section import EXPERIMENT, MODEL_NAME, NAME, WEBHOOK, AnySection, Section

logger = logging.getLogger(__name__)

# Words for settings that users of other tools type, and the fields that they mean here.


PLAIN = {
    "run.name": "run_name",
    "run.storage": "output_dir",
    "run.seed": "random_seed",
    "model.name": "model_name_or_path base_model model_name pretrained_model_name_or_path",
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype bf16 fp16 precision",
    "model.quantization": "quantization_config bnb_4bit_quant_type qlora",
    "model.attention": "attn_implementation flash_attn flash_attention xformers_attention use_flash_attention_2",
    "data.train": "dataset datasets dataset_name dataset_mixture dataset_dir train_file data_path train_dataset",
    "data.eval": "eval_dataset validation_file eval_data validation",
    "data.eval_fraction": "val_set_size val_size test_size",
    "data.max_length": "max_seq_length max_seq_len cutoff_len sequence_len model_max_length block_size",
    "data.too_long": "excess_length_strategy truncation_mode",
    "data.packing": "sample_packing",
    "data.chat_template": "chat_template_path chat_template_jinja",
    "data.train.0.format": "template",
    "data.train.0.fields": "dataset_text_field text_column",
    "adapter.method": "init_lora_weights peft_type finetuning_type",
    "adapter.rank": "rank r lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target lora_target_modules lora_target_linear",
    "adapter.rank_stabilized": "use_rslora",
    "train.epochs": "num_epochs num_train_epochs",
    "train.steps": "max_steps",
    "train.lr": "learning_rate",
    "train.lr_ratio": "loraplus_lr_ratio",
    "train.schedule": "lr_scheduler_type lr_scheduler",
    "train.clip": "max_grad_norm gradient_clipping",
    "train.micro_batch": "per_device_train_batch_size micro_batch_size train_micro_batch_size_per_gpu",
    "train.activation_checkpointing": "gradient_checkpointing",
    "train.global_batch": "batch_size train_batch_size global_batch_size",
    "train.eval_every": "eval_steps eval_strategy evals_per_epoch",
    "train.checkpoint_every": "save_steps save_strategy saves_per_epoch",
    "train.keep": "save_total_limit",
    "train.early_stop": "early_stopping_patience",
    "train.log_every": "logging_steps",
    "train.start": "resume_from_checkpoint adapter_name_or_path lora_model_dir",
    "cluster.workers": "num_workers num_processes nproc_per_node world_size num_nodes nnodes",
    "cluster.gpus_per_worker": "num_gpus",
    "cluster.cpus_per_worker": "num_cpus",
    "cluster.strategy": "fsdp deepspeed ddp",
    "cluster.fsdp_replicas": "dp_replicate_size hsdp",
    "cluster.fsdp_offload": "cpu_offload fsdp_cpu_offload",
    "cluster.max_failures": "max_retries",
    "evaluation.scorer": "compute_metrics metric_for_best_model",
    "evaluation.max_new_tokens": "generation_max_length",
    "tracking.uri": "tracking_uri mlflow_tracking_uri",
    "tracking.experiment": "experiment_name",
    "export.merged": "merge_lora merge_adapter",
    "registry.model": "registered_model_name hub_model_id push_to_hub",
}
"""Field -> the words that mean the same in transformers, PEFT, TRL, LLaMA-Factory and Axolotl, among others."""
EXPLAINED = {
    "gradient_accumulation_steps": "use train.global_batch, the sequences of a step over all workers; the accumulation"
    " follows from it and train.micro_batch",
    "per_device_eval_batch_size": "use train.micro_batch, for evaluations too",
    "warmup_ratio": "use train.warmup, a share of the steps",
    "warmup_steps": "use train.warmup, a share of the steps (0.03), not their number",
    "num_warmup_steps": "use train.warmup, a share of the steps (0.03), not their number",
    "load_in_4bit": "use model.quantization: nf4",
    "load_in_8bit": "use model.quantization: int8",
    "train_on_inputs": "only answers are supervised, and of format text everything",
    "optim": "the optimizer is AdamW",
    "optimizer": "the optimizer is AdamW",
    "report_to": "runs are tracked in MLflow; see tracking.uri and tracking.experiment",
}
"""Words for which there is no field that means just the same -> what to do."""
TRACKERS = ("wandb_", "mlflow_", "comet_", "neptune_", "swanlab_", "trackio_", "tensorboard")
"""Beginnings of words about trackers."""
REMOVED = {
    "gate.on": "delete it; the gate always measures on the rows of data.eval or data.eval_fraction",
    "gate.level": "delete it; the interval of the improvement always has a confidence of 0.95",
    "run.wait": "delete it; while another process works on the run, the command ends with exit code 75: repeat it then,"
    " as deploy/night.py does",
    "retrain.wait": "delete it; while another retraining of the model is at work, the command ends with exit code 75:"
    " repeat it then, as deploy/night.py does",
    "cluster.resize_interval": "delete it; the run itself decides how often it looks for room for more workers",
    "compare.centres": "delete it; each grid starts at its method's own centre and grows until the best rate is inside",
}
"""Fields that earlier configs had -> what to do instead."""


@cache
def _fields() -> dict[str, str]:
    """A word, in the form of `_plain`, -> the field that it means."""
    own: dict[str, list[str]] = {}
    for section, name in _own():
        own.setdefault(name, []).append(f"{section}.{name}")
    found = {_plain(name): places[0] for name, places in own.items() if len(places) == 1}
    return found | {_plain(word): field for field, words in PLAIN.items() for word in words.split()}


def _own() -> Iterator[tuple[str, str]]:
    for section, field in Config.model_fields.items():
        inner = next(iter(get_args(field.annotation)), field.annotation)
        assert isinstance(inner, type)
        assert issubclass(inner, Section)
        yield from ((section, each.alias or name) for name, each in inner.model_fields.items())


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").strip("_")


def meant(word: str) -> str | None:
    """The field of which this is the name, without its section, or another tool's word."""
    return _fields().get(_plain(word))


def spelling_advice(word: str, place: str = "") -> str | None:
    """Say what to do instead of a word that is no field at `place` (`use adapter.rank`); None if that is not known."""
    plain = _plain(word)
    if (field := meant(word)) and field != place:
        return f"use {field}"
    return EXPLAINED["report_to"] if plain.startswith(TRACKERS) else EXPLAINED.get(plain)


# YAML as configs are written: numbers such as 1e-4 are read, and texts that look like them are quoted.


_MERGE = "tag:yaml.org,2002:merge"
_OCTAL = re.compile("[-+]?0[0-7_]+")
_ODD_NUMBER = re.compile("[-+]?(0[xb]|[0-9_]+:)")
"""Numbers of YAML 1.1 that nobody means: 1:30 is 90, 0x10 is 16."""
_TOO_MUCH = "more than 50,000 values (aliases unfolded) or 50 levels of lists and mappings: not a config"


class Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.1 wants 1.0e-4), and refuses keys that come twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The next mapping, its keys as they are written; raises ConstructorError for one that comes twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for number, (key, value) in enumerate(node.value):
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _problem(key, "a list or mapping cannot be a key")
            if key.value in lines:
                raise _problem(key, f"the key {_quoted(key.value)} stands in line {lines[key.value]} already")
            lines[key.value] = key.start_mark.line + 1
            # A copy: the node may be the value of another key, through an alias.
            text = yaml.ScalarNode("tag:yaml.org,2002:str", key.value, key.start_mark, key.end_mark)
            node.value[number] = text, value
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; raises ConstructorError where it has none, or people would read another number."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair is no text
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
            raise _problem(node, f"{_quoted(node.value)} cannot be read; quote it if it is a text") from None
        if isinstance(value, int | float) and isinstance(node.value, str) and _ODD_NUMBER.match(node.value):
            return node.value  # a field of numbers refuses it
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _problem(node, f"{_quoted(node.value)} is too large")
        octal = isinstance(value, int) and isinstance(node.value, str) and _OCTAL.fullmatch(node.value)
        if octal and value != int(node.value.replace("_", "")):
            raise _problem(
                node,
                f"{_quoted(node.value)} would be {value}: with a 0 in front YAML counts in eights; write it without, or"
                " quote it if it is a text",
            )
        return value


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `Loader` would read as a number."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML; `where` names the text in the UserError, with the line, that broken YAML raises."""
    try:
        tree = yaml.load(text, Loader=Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join((error.problem or "").removeprefix("but ").split())
        raise UserError(f"{where}{line}: not valid YAML: {problem[:200]}") from None
    except yaml.reader.ReaderError as error:
        line = f", line {text.count(chr(10), 0, error.position) + 1}"
        raise UserError(
            f"{where}{line}: not valid YAML: the character #x{error.character:04x} is not allowed"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: {_TOO_MUCH}") from None
    # Aliases may unfold without end. The 10,000 files that a source may name are as many values.
    left, count = [(tree, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > 50_000 or depth > 50:
            raise UserError(f"{where}: {_TOO_MUCH}")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left += ((each, depth + 1) for each in inner)
    return tree


def _problem(node: yaml.Node, text: str) -> ConstructorError:
    return ConstructorError(None, None, text, node.start_mark)


def _quoted(value: object) -> str:
    text = value if isinstance(value, str) else "this"
    return ascii(text if len(text) <= 40 else f"{text[:37]}...")


# Dotted fields: a config as flat names and values, and changes given by such names.


FREE_TO_CHANGE = (
    "run.storage",
    "cluster.",
    "data.packing",
    "data.max_rejected",
    "tracking.",
    "export.",
    "registry.",
    "gate.",
    "retrain.",
    "notify.",
    "train.activation_checkpointing",
    "train.keep",
    "train.log_every",
)
"""Fields that may differ when a run is resumed: they do not change its numbers. What follows from data.packing is in
the digest of the tokens, and `auto` may be what was `true`. evaluation.* is bound: a checkpoint has the answers before
training, result.json their scores."""
LENGTH = ("train.steps", "train.epochs")
"""Fields of a run's length, which may become another one."""
SOURCES = ("data.train.", "data.eval.")
"""Fields of sources, which may be given as a path alone."""
NUMBERED = re.compile(r"data\.(train|eval)\.[0-9]+(\..+)?")
"""A source by its number, or a field of it."""


def parse_assignments(given: list[str]) -> dict[str, Any]:
    """`section.field=value` words of a command line as changes; values are YAML."""
    changes = {}
    for word in given:
        field, equals, value = word.partition("=")
        if not equals or "." not in field or "" in field.split("."):
            meant = spelling_advice(field) if equals else None
            hint = f"; {meant}" if meant else ""
            raise UserError(f"argument {secrets.mask(word)!r}: expected section.field=value{hint}")
        changes[field] = parse_yaml(value, f"argument {secrets.mask(word)!r}")
    return changes


def flatten(config: Section) -> dict[str, Any]:
    """Dotted field -> plain value, for MLflow parameters and comparisons."""
    return dict(leaves(config.model_dump(mode="json"), ""))


def leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted name and plain value of all below `prefix`; of lists only those of mappings are entered."""
    items: Any = ()
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        yield prefix, value
    for key, item in items:
        yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))


def at(config: Section, field: str, default: Any = None) -> Any:
    """The plain value of a dotted field, also of one that `flatten` enters: a section, a list of mappings."""
    node: Any = config.model_dump(mode="json")
    for part in field.split("."):
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and (place := _place(part, node)) is not None:
            node = node[place]
        else:
            return default
    return node


def changed(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with dotted fields set; raises UserError for a field that cannot be reached."""
    result: dict[str, Any] = {key: _copy(value) for key, value in tree.items()}
    for field, value in changes.items():
        if found := NUMBERED.fullmatch(field):
            _number_sources(result.get("data"), found[1])
        node: Any = result
        *parents, last = field.split(".")
        for part in parents:
            node = _child(node, part, field)
        if isinstance(node, list):
            if (place := _place(last, node)) is None:
                raise UserError(f"{field}: the list has {len(node)} entries, counted from 0")
            node[place] = value
        else:
            node[last] = value
    if "train.epochs" in changes and "train.steps" not in changes and isinstance(result.get("train"), dict):
        result["train"].pop("steps", None)  # of the two the later word is meant
    return result


def _number_sources(data: Any, name: str) -> None:
    """Write sources as a list of mappings, as the schema reads them: one alone is a list of one, a path a source."""
    if isinstance(data, dict):
        given = data.get(name)
        sources = given if isinstance(given, list) else [given or {}]
        data[name] = [{"path": source} if isinstance(source, str) else source for source in sources]


def _child(node: Any, part: str, field: str) -> Any:
    found = None
    if isinstance(node, list) and (place := _place(part, node)) is not None:
        found = node[place]
    elif isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        found = node[part]
    if isinstance(found, dict | list):
        return found
    if isinstance(found, str) and field.startswith(SOURCES):
        raise UserError(f"{field}: {part!r} is a path alone, without fields; write it as {{path: ...}}")
    raise UserError(f"{field}: {part!r} has no fields to set")


def _place(part: str, node: list[Any]) -> int | None:
    """The place in a list that a part of a field's name is, if it is one."""
    return int(part) if re.fullmatch(r"[0-9]{1,9}", part) and int(part) < len(node) else None


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


# Messages for settings that cannot be: each names its field and says what to do.


_UNION_TAG = re.compile(r"[\[\](){}]|^(tuple|literal|float|str|int|constrained-\w+)\b")
PHRASES = {
    "tuple_type": "expected a list, [...]",
    "dict_type": "expected a mapping, {name: value}",
    "too_short": "at least 1 item is needed",
    "model_type": "expected a mapping of fields, {name: value}",
    "model_attributes_type": "expected a mapping of fields, {name: value}",
}
"""pydantic's kinds of problems -> words for those who write YAML."""
PATTERNS = {
    NAME: "a name has letters, digits, '.', '_' and '-' only, begins with a letter or digit and does not end with '.'",
    MODEL_NAME: "a name has letters, digits, ' ', '.', '_' and '-' only, and begins and ends with a letter or digit",
    EXPERIMENT: "a name of printable characters is expected",
    WEBHOOK: "an address is expected: http://... or https://..., or env:NAME or file:/PATH that holds one",
}
"""The patterns of texts in words."""


def explain(item: ErrorDetails, root: type[Section]) -> str:
    """One of pydantic's problems as `field: what is wrong`, with what the user may have meant; no secret is in it."""
    return _short(_explain(item, root), 500)


def _explain(item: ErrorDetails, root: type[Section]) -> str:
    # pydantic puts the tags of unions into the location: only names and indices are the user's.
    *outer, last = [str(part) for part in item["loc"]] or [""]
    parts = [part for part in outer if not _UNION_TAG.search(part)]
    unknown = item["type"] == "extra_forbidden"
    if unknown or (last and not _UNION_TAG.search(last)):
        parts.append(last)
    field = _short(".".join(parts), 200)
    if unknown:
        return f"{field}: unknown field; {_instead_of(parts, root, item['input'])}"
    if item["type"] == "missing":
        return f"{field}: required, but not set"
    message = PHRASES.get(item["type"]) or item["msg"].removeprefix("Value error, ")
    if item["type"] == "string_pattern_mismatch":
        message = PATTERNS.get(item.get("ctx", {}).get("pattern", ""), message)
    message = message[0].lower() + message[1:]
    shown = "" if item["type"] == "value_error" else f" (got {_excerpt(item['input'])})"
    return f"{field}: {message}{shown}" if field else message


def relevant(items: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The problems without those that only follow from another: a list with a broken entry also counts as too short."""
    return [
        item
        for item in items
        if not (item["type"] == "too_short" and item["input"])
        or not any(other is not item and other["loc"][: len(item["loc"])] == item["loc"] for other in items)
    ]


def _instead_of(parts: Sequence[str], root: type[Section], value: object) -> str:
    """Say what to do instead of an unknown field: the word of another tool, a typo, or a look at the list."""
    if secrets.is_name(parts[-1]):
        return "a config holds no secrets, they come from the environment or a file"
    if advice := REMOVED.get(".".join(parts)):
        return advice
    if issubclass(root, Config | EvaluationConfig) and (advice := spelling_advice(parts[-1], ".".join(parts))):
        return advice
    near = difflib.get_close_matches(parts[-1], _names_beside(parts, root), n=1)
    if near and (len(parts) > 1 or isinstance(value, dict)):  # what has no fields is no section
        return f"did you mean {'.'.join([*parts[:-1], near[0]])}?"
    return "--help lists the fields"


def _excerpt(value: Any) -> str:
    """A value in an error message; of a mapping no values, since its keys may be anything."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"[{', '.join([*map(_excerpt, value[:8]), *['...'] * (len(value) > 8)])}]"
    return _short(repr(value), 80)


def _short(text: str, length: int) -> str:
    """One line without secrets, cut: they are masked first, because a part of one is not recognised."""
    line = " ".join(secrets.mask(text).splitlines())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def instead(field: str, text: str) -> str:
    """The way to give the secret that stands in a field."""
    if field not in ("tracking.uri", "notify.url"):
        names = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN"
        return f"has a secret in its address; write it without, and set the service's variables ({names})"
    if field == "tracking.uri" and text.startswith("http"):
        return (
            "has a secret in its address; write it without, and set MLFLOW_TRACKING_USERNAME and"
            " MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return (
        "has a secret in its address; put the address in a variable or a file of one line, and write env:NAME"
        " or file:/PATH"
    )


def _names_beside(parts: Sequence[str], root: type[Section]) -> list[str]:
    section = root
    for part in parts[:-1]:
        named = section.model_fields.items()
        field = next((field for name, field in named if part in (name, field.alias)), None)
        section = (_section_in(field.annotation) if field else None) or section
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation is, or has inside, as tuple[Source, ...] does."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """Read a config file and apply dotted `changes`.

    Raises UserError that lists every problem with its field.
    """
    file, changes = read(path), changes or {}
    config = build(changed(file, changes), str(path))
    before, train = (file.get("train") or {}).get("steps"), config.train
    if before and train.steps is None and "train.epochs" in changes:
        logger.info(f"train.epochs takes the place of train.steps={before} in {path}")
    elif train.steps and train.epochs != 1 and "train.steps" not in changes:
        logger.warning(f"{path}: train.steps={train.steps} decides; train.epochs={train.epochs:g} counts for nothing")
    return config


def read(path: str | Path) -> dict[str, Any]:
    """Read the sections of a config file, not validated yet."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"config file {path}: not UTF-8 text") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections (run:, model:, data:, ...), found {type(tree).__name__}")
    return tree


def build(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Validate a nested mapping into a Config; raises UserError with all problems together, and no secret in it.

    The section of pipelines/compare.py may stand in the same file, and is left out. A run without a name gets one.
    """
    found = validated(Config, {name: section for name, section in tree.items() if name != "compare"}, where)
    if found.run.name == "auto":
        found = override(found, {"run.name": _own_name(found)})
        logger.info(f"run.name: {found.run.name}, from the settings")
    return found


def _own_name(config: Config) -> str:
    """A name from the settings that decide what comes out, with paths as they are written, but for the length.

    What is left at its default is not in it: a new release with a new field does not change it.
    """
    given = leaves(config.model_dump(mode="json", exclude_defaults=True), "")
    others = (*FREE_TO_CHANGE, *LENGTH)
    digest = digest_json({field: value for field, value in given if not field.startswith(others)}, length=8)
    return f"{config.adapter.method}-r{config.adapter.rank}-{digest}"


def validated(section: type[AnySection], tree: Mapping[str, Any], where: str) -> AnySection:
    """Validate a nested mapping into a section; raises UserError with all problems together, and no secret in it."""
    named = [(field, value if isinstance(value, list | tuple) else [value]) for field, value in leaves(tree, "")]
    texts = [(field, item) for field, items in named for item in items if isinstance(item, str)]
    problems = [f"{field}: {instead(field, text)}" for field, text in texts if secrets.in_uri(text)]
    found = None
    try:
        found = section.model_validate(tree)
    except ValidationError as error:
        problems += [explain(item, section) for item in relevant(error.errors())]
    if len(problems) == 1:
        raise UserError(f"{where}: {problems[0]}")
    if problems or found is None:
        more = [f"and {len(problems) - 100} more"] if len(problems) > 100 else []
        raise Problems(f"{where} has {len(problems)} problems", *problems[:100], *more)
    return found


def override(config: AnySection, changes: Mapping[str, Any]) -> AnySection:
    """A new config with dotted fields changed, e.g. {"adapter.rank": 32}; validates everything again."""
    return validated(type(config), changed(config.model_dump(mode="json"), changes), "config")


def dump(config: Config) -> str:
    """The config as YAML that `load` reads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)
