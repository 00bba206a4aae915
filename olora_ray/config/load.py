"""Read configs from YAML files and nested mappings, validate them, and write them as YAML."""

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from olora_ray.common import secrets, storage
from olora_ray.common.errors import UserError, of_problems
from olora_ray.common.text import did_you_mean, shortened
from olora_ray.config.schema import Config, EvaluationConfig
from olora_ray.config.section import (
    EXPERIMENT,
    HUB_NAME,
    MODEL_NAME,
    NAME,
    REFER,
    AnySection,
    Section,
)

logger = logging.getLogger(__name__)

# Names of settings in other tools, and the fields here that mean the same.


PLAIN = {
    "run.name": "run_name",
    "run.storage": "output_dir",
    "run.seed": "random_seed",
    "model.name": "model_name_or_path base_model model_name pretrained_model_name_or_path",
    "model.revision": "model_revision revision_of_model",
    "model.dtype": "torch_dtype bf16 fp16 precision",
    "model.quantization": "quantization_config bnb_4bit_quant_type qlora",
    "model.attention": "attn_implementation flash_attn flash_attention xformers_attention use_flash_attention_2",
    "data.train": "dataset datasets dataset_name dataset_mixture dataset_dir train_file data_path train_dataset",
    "data.eval": "eval_dataset validation_file eval_data validation",
    "data.eval_fraction": "val_set_size val_size test_size",
    "data.max_length": "max_seq_length max_seq_len cutoff_len sequence_len model_max_length block_size",
    "data.too_long": "excess_length_strategy truncation_mode",
    "data.packing": "sample_packing neat_packing",
    "data.chat_template": "chat_template_path chat_template_jinja",
    "data.train.0.fields": "dataset_text_field text_column",
    "adapter.method": "init_lora_weights peft_type finetuning_type",
    "adapter.rank": "rank r lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target lora_target_modules lora_target_linear",
    "adapter.rank_stabilized": "use_rslora peft_use_rslora",
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
    "train.optimizer": "optim precondition",
    "train.early_stop": "early_stopping_patience",
    "train.log_every": "logging_steps",
    "train.start": "resume_from_checkpoint adapter_name_or_path lora_model_dir",
    "cluster.workers": "num_workers ray_num_workers num_processes nproc_per_node world_size num_nodes nnodes",
    "cluster.gpus_per_worker": "num_gpus",
    "cluster.cpus_per_worker": "num_cpus",
    "cluster.strategy": "fsdp deepspeed ddp",
    "cluster.fsdp_replicas": "dp_replicate_size hsdp",
    "cluster.max_failures": "max_retries",
    "evaluation.scorer": "compute_metrics metric_for_best_model",
    "evaluation.max_new_tokens": "generation_max_length",
    "tracking.uri": "tracking_uri mlflow_tracking_uri",
    "tracking.experiment": "experiment_name",
    "export.merged": "merge_lora merge_adapter",
    "export.push": "hub_model_id push_to_hub",
    "registry.model": "registered_model_name",
}
"""Field -> names of the same setting in transformers, PEFT, TRL, LLaMA-Factory, Axolotl and others."""
EXPLAINED = {
    "gradient_accumulation_steps": "use train.global_batch, the sequences of a step over all workers; together with"
    " train.micro_batch it decides the accumulation",
    "per_device_eval_batch_size": "use train.micro_batch; it also applies to evaluations",
    "warmup_ratio": "use train.warmup, a share of the steps",
    "warmup_steps": "use train.warmup, a share of the steps (0.03), not their number",
    "num_warmup_steps": "use train.warmup, a share of the steps (0.03), not their number",
    "template": "use the model's own chat template by deleting it, or data.chat_template for a file",
    "load_in_4bit": "use model.quantization: nf4",
    "load_in_8bit": "use model.quantization: int8",
    "train_on_inputs": "delete it; only answers are supervised, except in format text, which is supervised completely",
    "report_to": "delete it; runs are tracked in MLflow: set tracking.uri and tracking.experiment",
}
"""Names of settings without an equivalent field -> what to do."""
TRACKERS = ("wandb_", "mlflow_", "comet_", "neptune_", "swanlab_", "trackio_", "tensorboard")
"""Prefixes of names of settings about trackers."""


SYNONYMS = {
    "model.model_name_or_path": "model.name",
    "model.model_revision": "model.revision",
    "model.torch_dtype": "model.dtype",
    "model.attn_implementation": "model.attention",
    "adapter.r": "adapter.rank",
    "adapter.lora_r": "adapter.rank",
    "adapter.lora_alpha": "adapter.alpha",
    "adapter.lora_dropout": "adapter.dropout",
    "adapter.target_modules": "adapter.targets",
    "adapter.lora_target_modules": "adapter.targets",
    "adapter.use_rslora": "adapter.rank_stabilized",
    "train.num_train_epochs": "train.epochs",
    "train.max_steps": "train.steps",
    "train.learning_rate": "train.lr",
    "train.loraplus_lr_ratio": "train.lr_ratio",
    "train.warmup_ratio": "train.warmup",
    "train.max_grad_norm": "train.clip",
    "train.gradient_checkpointing": "train.activation_checkpointing",
    "train.eval_steps": "train.eval_every",
    "train.save_steps": "train.checkpoint_every",
    "train.logging_steps": "train.log_every",
    "train.save_total_limit": "train.keep",
    "train.early_stopping_patience": "train.early_stop",
    "tracking.tracking_uri": "tracking.uri",
    "tracking.experiment_name": "tracking.experiment",
    "registry.registered_model_name": "registry.model",
}
"""Names in Hugging Face's libraries and MLflow with exactly the meaning and values of a field -> the field.

They work in config files and on the command line. Another name of `PLAIN` may count something else, such as rows
instead of packs, or its values differ: it stays an error with advice."""


def renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested mapping with the fields' own names instead of SYNONYMS; log each.

    Raises UserError if a field is set under two names.
    """
    result = dict(tree)
    for name, field in SYNONYMS.items():
        section, _, word = name.partition(".")
        own = field.removeprefix(f"{section}.")
        values = result.get(section)
        if not isinstance(values, dict) or word not in values:
            continue
        if own in values:
            raise _set_twice(name, field)
        result[section] = {own if key == word else key: value for key, value in values.items()}
        logger.info(f"{name} is read as {field}")
    return result


def _set_twice(name: str, field: str) -> UserError:
    return UserError(f"{name}: means {field}, which is set too, by this or another name; set one")


@cache
def _own_names() -> dict[str, str]:
    own: dict[str, list[str]] = {}
    for section, field in Config.model_fields.items():
        inner: Any = next(iter(get_args(field.annotation)), field.annotation)
        for name, each in inner.model_fields.items():
            word = each.alias or name
            own.setdefault(word, []).append(f"{section}.{word}")
    # A field's own name means that field only if no other section has a field of this name.
    return {_plain(word): names[0] for word, names in own.items() if len(names) == 1}


@cache
def _fields() -> dict[str, str]:
    fields = dict(_own_names())
    for name, words in PLAIN.items():
        fields |= dict.fromkeys(map(_plain, words.split()), name)
    return fields


def keyword(word: str) -> str | None:
    """Return the field that a name without its section means exactly; None if there is none, or several.

    Unlike `meant`, another tool's name counts only if its values mean the same (SYNONYMS).
    """
    same = {name.partition(".")[2]: field for name, field in SYNONYMS.items()}
    return _own_names().get(word) or same.get(word)


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").strip("_")


def meant(word: str) -> str | None:
    """Return the field for a name without its section, or for another tool's name; None if there is no such field."""
    return _fields().get(_plain(word))


def spelling_advice(word: str, place: str = "") -> str | None:
    """Return advice for a word that is no field at `place` (`use adapter.rank`), or None."""
    plain = _plain(word)
    field = meant(word)
    if field and field != place:
        return f"use {field}"
    if plain.startswith(TRACKERS):
        return EXPLAINED["report_to"]
    return EXPLAINED.get(plain)


# YAML as people write configs: 1e-4 is a number (YAML 1.1 reads a text), and texts that look like numbers are quoted.


_MERGE = "tag:yaml.org,2002:merge"
_OCTAL = re.compile("[-+]?0[0-7_]+")
_ODD_NUMBER = re.compile("[-+]?(0[xb]|[0-9_]+:)")
"""Numbers of YAML 1.1 that nobody intends: 1:30 is 90, 0x10 is 16."""
_TOO_MUCH = (
    "more than 50,000 values (with aliases expanded) or 50 nested levels; this is not a config"
)


class Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.1 requires 1.0e-4), and rejects duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for number, (key, value) in enumerate(node.value):
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _problem(key, "a list or mapping cannot be a key")
            if key.value in lines:
                raise _problem(
                    key, f"duplicate key {_quoted(key.value)}, first in line {lines[key.value]}"
                )
            lines[key.value] = key.start_mark.line + 1
            # Keys stay as they are written: `on:` must not become true. A copy, because through an alias the same node
            # may also be the value of another key.
            text = yaml.ScalarNode("tag:yaml.org,2002:str", key.value, key.start_mark, key.end_mark)
            node.value[number] = text, value
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()  # fails for half of a surrogate pair, which no file can contain
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
            raise _problem(
                node, f"{_quoted(node.value)} is not valid; quote it if it is text"
            ) from None
        if (
            isinstance(value, int | float)
            and isinstance(node.value, str)
            and _ODD_NUMBER.match(node.value)
        ):
            return node.value  # as text, which a numeric field rejects
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _problem(node, f"{_quoted(node.value)} is too large")
        octal = (
            isinstance(value, int) and isinstance(node.value, str) and _OCTAL.fullmatch(node.value)
        )
        if octal and value != int(node.value.replace("_", "")):
            raise _problem(
                node,
                f"{_quoted(node.value)} is octal in YAML and means {value}; remove the leading 0, or"
                " quote it if it is text",
            )
        return value


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts which `Loader` would read as numbers."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML; raise UserError with `where` and the line if it is not valid."""
    try:
        tree = yaml.load(text, Loader=Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        if error.problem_mark:
            where = f"{where}, line {error.problem_mark.line + 1}"
        problem = " ".join((error.problem or "").removeprefix("but ").split())
        raise UserError(f"{where}: not valid YAML: {problem[:200]}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{where}, line {line}: not valid YAML: remove the character #x{error.character:04x}"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: {_TOO_MUCH}") from None
    # A few lines with nested aliases may expand to billions of values, and validation would never end. The limit leaves
    # room for the 10,000 files that `only` of a source may list.
    left = [(tree, 0)]
    count = 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > 50_000 or depth > 50:
            raise UserError(f"{where}: {_TOO_MUCH}")
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            left += ((each, depth + 1) for each in value)
    return tree


def _problem(node: yaml.Node, text: str) -> ConstructorError:
    return ConstructorError(None, None, text, node.start_mark)


def _quoted(value: object) -> str:
    if not isinstance(value, str):
        value = "this"
    return ascii(shortened(value, 40))


# Dotted fields: a config as flat names and values, and changes to it by such names.


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
"""Fields that may differ when a run is resumed, because they do not change its numbers.

data.packing may change between `auto` and `true`; if packing itself changes, the digest of the tokens differs.
evaluation.* must not change: checkpoints hold the answers before training, and result.json holds their scores."""
LENGTH = ("train.steps", "train.epochs")
"""Fields that decide the length of a run; they may change when it is resumed."""
SOURCES = ("data.train.", "data.eval.")
"""Prefixes of fields of sources; a source may also be written as a path alone."""
NUMBERED = re.compile(r"data\.(train|eval)\.[0-9]+(\..+)?")
"""A source by its index, or one of its fields."""


RETIRED: dict[str, tuple[Any, str]] = {
    "adapter.gamma": (16.0, "delete it; only lora_ga read it"),
    "cluster.fsdp_offload": (
        False,
        "delete it; if GPU memory is short, lower train.micro_batch or data.max_length, or use more workers",
    ),
    "cluster.price": (
        None,
        "delete it; multiply the GPU seconds that `olora-ray registry show` prints by your price",
    ),
    "model.allow_pickle": (
        False,
        "delete it; convert the weights to safetensors at https://huggingface.co/spaces/safetensors/convert, and set"
        " model.revision to the pull request that it opens (refs/pr/N)",
    ),
    "model.compile": (False, "delete it; GPUs with Triton have kernels instead"),
    "gate.confirm": (
        0.0,
        "delete it; the gate looks at all held-out rows at once, which finds better versions as often",
    ),
}
"""Removed field -> its last default, and what to do instead of another value.

Files of earlier releases name these fields. At its default a removed field is dropped in silence."""
RETIRED_EARLIER: dict[str, tuple[Any, str]] = {
    "cluster.spares": (0, "delete it; all workers restart from a checkpoint when one is lost"),
    "train.precondition": (False, "use train.optimizer: preconditioned"),
}
"""The same for fields that the release before this one did not have either: what a run is known by lacks them."""
ADDED: dict[str, tuple[Any, ...]] = {
    "train.objective": ("auto", "tokens"),
    "train.beta": (0.1,),
    "train.chosen": (0.0,),
    "evaluation.guard": (True, False),
    "gate.shrink": (True, False),
    "data.*.roles": ({},),
    "data.*.labels": ({},),
    "data.*.system": (None,),
    "data.*.markup": ("auto",),
}
"""Field that runs and searches of earlier releases do not have -> the values that mean what they did.

`data.*` is any source."""
RETIRED_VALUES: dict[str, dict[str, str]] = {
    "adapter.method": {
        "lora_ga": "use eva, which starts from the training data too",
        "olora_even": "use olora",
        "pissa_fast": "use pissa",
    },
}
"""Field -> its removed values, and what to do instead."""


def without_retired(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a copy of a nested mapping without removed fields and values, and their problems.

    A removed field at its default is no problem.
    """
    kept: dict[str, Any] = _copy(tree)
    problems = []
    for field, (default, advice) in (RETIRED | RETIRED_EARLIER).items():
        section, last = _section_of(kept, field)
        if last in section and section.pop(last) != default:
            problems.append(f"{field}: this field was removed; {advice}")
    for field, removed in RETIRED_VALUES.items():
        section, last = _section_of(kept, field)
        value = section.get(last)
        if isinstance(value, str) and value in removed:
            del section[last]
            problems.append(f"{field}: {value} was removed; {removed[value]}")
    return kept, problems


def _section_of(tree: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    """Return the mapping that may hold a dotted field, and the field's name in it."""
    *parents, last = field.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, dict):
            node = node.get(part)
    if not isinstance(node, dict):
        return {}, last
    return node, last


def parse_assignments(given: list[str]) -> dict[str, Any]:
    """Return the `section.field=value` words of a command line as changes; values are YAML."""
    changes = {}
    names: dict[str, str] = {}
    for word in given:
        field, equals, value = word.partition("=")
        if not equals or "." not in field or "" in field.split("."):
            problem = f"argument {secrets.mask(word)!r}: expected section.field=value"
            advice = spelling_advice(field) if equals else None
            if advice:
                problem += f"; {advice}"
            raise UserError(problem)
        name = field
        field = SYNONYMS.get(name, name)
        if names.setdefault(field, name) != name:
            raise _set_twice(name if name != field else names[field], field)
        if name != field:
            logger.info(f"{name} is read as {field}")
        changes[field] = parse_yaml(value, f"argument {secrets.mask(word)!r}")
    return changes


def flatten(config: Section) -> dict[str, Any]:
    """Return dotted field -> plain value, for MLflow parameters and comparisons."""
    return dict(leaves(config.model_dump(mode="json"), ""))


def leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted names and plain values below `prefix`; a list is a single value unless it holds mappings."""
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
    """Return the plain value of a dotted field, which may also be a section or a list of mappings."""
    node: Any = config.model_dump(mode="json")
    for part in field.split("."):
        if isinstance(node, list):
            index = _index(part, node)
            if index is None:
                return default
            node = node[index]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return default
    return node


def changed(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a nested mapping with dotted fields set; raise UserError for an unreachable field."""
    result: dict[str, Any] = {key: _copy(value) for key, value in tree.items()}
    for field, value in changes.items():
        numbered = NUMBERED.fullmatch(field)
        data = result.get("data")
        if numbered and isinstance(data, dict):
            # `data.train: a.jsonl` is allowed, but `data.train.0.weight=2` needs a list of mappings to set a field in.
            sources = data.get(numbered[1])
            if not isinstance(sources, list):
                sources = [sources or {}]
            data[numbered[1]] = [
                {"path": source} if isinstance(source, str) else source for source in sources
            ]
        node: Any = result
        *parents, last = field.split(".")
        for part in parents:
            node = _child(node, part, field)
        if isinstance(node, list):
            index = _index(last, node)
            if index is None:
                raise UserError(
                    f"{field}: no such entry; the list has {len(node)} entries, counted from 0"
                )
            node[index] = value
        else:
            node[last] = value
    if (
        "train.epochs" in changes
        and "train.steps" not in changes
        and isinstance(result.get("train"), dict)
    ):
        result["train"].pop("steps", None)  # the command line overrides the file
    return result


def _child(node: Any, part: str, field: str) -> Any:
    child = None
    if isinstance(node, list):
        index = _index(part, node)
        if index is not None:
            child = node[index]
    elif isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        child = node[part]
    if isinstance(child, dict | list):
        return child
    if isinstance(child, str) and field.startswith(SOURCES):
        raise UserError(f"{field}: {part!r} is a path without fields; write it as {{path: ...}}")
    raise UserError(f"{field}: {part!r} has no fields to set")


def _index(part: str, items: list[Any]) -> int | None:
    if re.fullmatch(r"[0-9]{1,9}", part) and int(part) < len(items):
        return int(part)
    return None


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


# Messages for invalid settings: each names its field and says what to do.


_UNION_TAG = re.compile(r"[\[\](){}]|^(tuple|literal|float|str|int|constrained-\w+)\b")
PHRASES = {
    "tuple_type": "expected a list, [...]",
    "dict_type": "expected a mapping, {name: value}",
    "too_short": "expected at least 1 item",
    "model_type": "expected a mapping of fields, {name: value}",
    "model_attributes_type": "expected a mapping of fields, {name: value}",
}
"""Error types of pydantic -> messages for people who write YAML."""
PATTERNS = {
    NAME: "use letters, digits, '.', '_' and '-'; begin with a letter or digit, and do not end with '.'",
    MODEL_NAME: "use letters, digits, ' ', '.', '_' and '-'; begin and end with a letter or digit",
    EXPERIMENT: "use printable characters only",
    HUB_NAME: "expected ORG/NAME, a repository of the Hugging Face hub",
}
"""Patterns of field types -> messages."""


def _explained(item: ErrorDetails, root: type[Section]) -> str:
    """Return an error of pydantic as `field: problem; advice`."""
    # pydantic adds tags of union members to the location. The user wrote only names and indices.
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
    if not field:
        return message
    if item["type"] != "value_error":
        message += f" (got {_excerpt(item['input'])})"
    return f"{field}: {message}"


def relevant(items: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Drop problems that only follow from another one: pydantic also calls a list with an invalid entry too short."""
    kept = []
    for item in items:
        place = item["loc"]
        inside = [other for other in items if other["loc"][: len(place)] == place]
        if item["type"] != "too_short" or not item["input"] or len(inside) == 1:
            kept.append(item)
    return kept


def _joined(lines: Sequence[str]) -> list[str]:
    """Join the problems that the alternatives of one field have with one value: it must be a number or 'auto'."""
    joined: list[str] = []
    for line in lines:
        field, expected, rest = line.partition(": input should be ")
        value = rest[rest.rfind(" (got ") :]
        if (
            joined
            and expected
            and joined[-1].startswith(field + expected)
            and joined[-1].endswith(value)
        ):
            joined[-1] = f"{joined[-1].removesuffix(value)} or {rest}"
        else:
            joined.append(line)
    return joined


def _instead_of(parts: Sequence[str], root: type[Section], value: object) -> str:
    if secrets.is_name(parts[-1]):
        return "delete it; secrets come from environment variables or files, never from a config"
    if issubclass(root, Config | EvaluationConfig):
        advice = spelling_advice(parts[-1], ".".join(parts))
        if advice:
            return advice
    # Last, because names of other tools resemble fields with another meaning: do_train is not `train`.
    section = root
    for part in parts[:-1]:
        for name, field in section.model_fields.items():
            if part in (name, field.alias):
                section = _section_in(field.annotation) or section
                break
    beside = [field.alias or name for name, field in section.model_fields.items()]
    near = difflib.get_close_matches(parts[-1], beside, n=1)
    # A plain value cannot be a misspelt section.
    if near and (len(parts) > 1 or isinstance(value, dict)):
        return f"did you mean {'.'.join([*parts[:-1], near[0]])}?"
    return "--help all lists the fields"


def _excerpt(value: Any) -> str:
    # A mapping is not shown: any of its keys may hold a secret, and no name tells which one.
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        shown = [_excerpt(each) for each in value[:8]]
        if len(value) > 8:
            shown.append("...")
        return f"[{', '.join(shown)}]"
    return _short(repr(value), 80)


def _short(text: str, length: int) -> str:
    # Mask before cutting: a secret that is cut in half is not recognised.
    return shortened(" ".join(secrets.mask(text).splitlines()), length)


def instead(field: str, text: str) -> str:
    if field != "tracking.uri":
        names = (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN"
        )
        return f"the address contains a secret; remove it, and set the environment variables of the service ({names})"
    if text.startswith("http"):
        return (
            "the address contains a secret; remove it, and set MLFLOW_TRACKING_USERNAME and"
            " MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return f"the address contains a secret; {REFER}"


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in get_args(annotation):
        section = _section_in(inner)
        if section:
            return section
    return None


def load_config(path: str | PathLike[str], changes: Mapping[str, Any] | None = None) -> Config:
    """Read a config file and apply dotted `changes`; raise UserError that lists every problem with its field."""
    file = read_tree(path)
    changes = changes or {}
    config = build(changed(file, changes), str(path))
    before = (file.get("train") or {}).get("steps")
    train = config.train
    if before and train.steps is None and "train.epochs" in changes:
        logger.info(f"train.epochs overrides train.steps={before} of {path}")
    elif train.steps and train.epochs != 1 and "train.steps" not in changes:
        logger.warning(
            f"{path}: train.steps={train.steps} overrides train.epochs={train.epochs:g}; delete one"
        )
    return config


def read_tree(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a config file without validation; raise UserError if it is no YAML mapping."""
    of_rows = f"{path}: a file of rows, not a config; olora-ray init {path} writes a config for it"
    if Path(path).suffix in (".jsonl", ".csv", ".tsv", ".parquet", ".txt") and Path(path).exists():
        raise UserError(of_rows)
    tree = read_yaml(path, "config file")
    if isinstance(tree, list) and Path(path).suffix == ".json":
        raise UserError(of_rows)
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: expected sections (run:, model:, data:, ...), not {type(tree).__name__}"
        )
    return renamed(tree)


def read_yaml(path: str | PathLike[str], what: str) -> Any:
    """Return the content of a user's file; raise a UserError that begins with `what` if it cannot be read."""
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        hint = ""
        if isinstance(error, FileNotFoundError):
            hint = did_you_mean(str(path))
        raise UserError(f"{what} {path}: {error.strerror}{hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path}: not UTF-8 text") from None


def build(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Validate a nested mapping into a Config; raise UserError with all problems and without secrets.

    A section `compare` (of `olora-ray compare`) is ignored. A run without a name gets one.
    """
    tree = renamed(tree)
    tree.pop("compare", None)
    config = validated(Config, tree, where)
    if config.run.name == "auto":
        # Defaults are left out, so that a new field in a new release does not rename old runs. The length is left out,
        # so that a run can be trained longer under the same name.
        given = leaves(config.model_dump(mode="json", exclude_defaults=True), "")
        others = (*FREE_TO_CHANGE, *LENGTH)
        named = {field: value for field, value in given if not field.startswith(others)}
        digest = storage.digest_json(named, length=8)
        name = f"{config.adapter.method}-r{config.adapter.rank}-{digest}"
        config = override(config, {"run.name": name})
        logger.info(f"run.name: auto is {config.run.name}")
    return config


def read_config(location: str) -> Config:
    """Read the config of a run, a path or URI, as `build` does; raise OSError if it cannot be read.

    A removed field that never changed the numbers of a run is dropped whatever its value is: the run has ended with it,
    and its user cannot edit this file. If an earlier release allowed other gates and notifications, these are dropped.
    """
    tree = parse_yaml(storage.read_text(location), location)
    if isinstance(tree, dict):
        for field in RETIRED | RETIRED_EARLIER:
            section, _, name = field.partition(".")
            if field.startswith(FREE_TO_CHANGE) and isinstance(tree.get(section), dict):
                tree[section].pop(name, None)
        try:
            return build(tree, location)
        except UserError:
            tree = {section: tree[section] for section in tree if section not in ("gate", "notify")}
    return build(tree, location)


def validated(section: type[AnySection], tree: Mapping[str, Any], where: str) -> AnySection:
    """Validate a nested mapping into a section; raise UserError with all problems and without secrets.

    Removed fields are dropped at their defaults, and are problems at other values.
    """
    tree, retired = without_retired(tree)
    problems = []
    for field, value in leaves(tree, ""):
        if field.startswith("notify."):  # its fields take no address at all
            continue
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and secrets.in_uri(text):
                problems.append(f"{field}: {instead(field, text)}")
    problems += retired
    valid = None
    try:
        valid = section.model_validate(tree)
    except ValidationError as error:
        errors = [_explained(item, section) for item in relevant(error.errors())]
        problems += _joined([_short(line, 500) for line in errors])
    if valid is None or problems:
        heading = f"{where} has {len(problems)} problems"
        if len(problems) == 1:
            problems = [f"{where}: {problems[0]}"]
        elif len(problems) > 100:
            problems[100:] = [f"and {len(problems) - 100} more"]
        raise of_problems(heading, problems)
    return valid


def override(config: AnySection, changes: Mapping[str, Any]) -> AnySection:
    """Return a config with dotted fields changed, e.g. {"adapter.rank": 32}, and validated again."""
    return validated(type(config), changed(config.model_dump(mode="json"), changes), "config")


def with_model(config: AnySection, name: str, revision: str | None = None) -> AnySection:
    """Return a config with another model."""
    return override(config, {"model.name": name, "model.revision": revision})


def dump(config: Config) -> str:
    """Return the config as YAML; `load_config` reads it back to an equal config."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True
    )
