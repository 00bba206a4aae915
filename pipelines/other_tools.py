"""Configs of Axolotl, LLaMA-Factory and TRL, turned into ours.

`COMPUTED` and other_tools.yaml are all that is understood of their fields. Another field, or a value that our field
does not take, has no place here and is named: nothing of a file is left out in silence. Defaults of a tool that change
the result and differ from ours are read as if they were in the file.
"""

import json
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from olora_ray.common import secrets
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.text import plural
from olora_ray.config.load import build, changed, meant, parse_yaml

Given = dict[str, Any]
Meaning = tuple[Given, str]
"""Our fields with their values, and what differs from the other tool; an empty text: nothing."""

TABLE = parse_yaml(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), "other_tools.yaml"
)


def _of_pairs(given: Given) -> bool:
    return "dpo" in (given.get("stage"), given.get("rl")) or "beta" in given


def _rows(entry: Given, pairs: bool) -> tuple[Given, list[str]]:
    """Return a source for an entry of `datasets` or of dataset_info.json, and its settings that have no place."""
    left: Given = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            left |= value
        elif value is not None:
            left[name] = value
    path = left.pop("path")
    kind = left.get("type")
    if isinstance(left.get("data_files"), str) and path in ("json", "csv", "parquet", "text"):
        path = left.pop("data_files")
    if not (Path(path).exists() or re.search(r"://|^[./~]|\.(jsonl?|parquet|csv|tsv|txt)\b", path)):
        options = [
            f"{name}={left.pop(name)}" for name in ("name", "split", "revision") if name in left
        ]
        path = f"hf://{path}"
        if options:
            path += f"?{'&'.join(options)}"
    fields = {}
    if str(kind).startswith("chat_template") and not pairs:
        fields = {"conversations": "messages", "from": "role", "value": "content"}
    columns = TABLE["pairs" if pairs else "columns"]
    fields |= {field: left.pop(name) for name, field in columns.items() if name in left}
    form = "alpaca" if "instruction" in fields else "auto"
    if pairs:
        left.pop("type", None)
        left.pop("ranking", None)
    elif kind in TABLE["formats"]:
        form = TABLE["formats"][left.pop("type")]
    source = {"path": path, "format": form}
    fields = {field: column for field, column in fields.items() if field != column}
    if fields:
        source["fields"] = fields
    return source, [*left]


def _sources(field: str, entries: list[Given], given: Given) -> Meaning:
    sources = []
    left = []
    for number, entry in enumerate(entries):
        source, rest = _rows(entry, _of_pairs(given))
        sources.append(source)
        left += [f"{number}.{name}" for name in rest]
    notes = []
    if left:
        notes.append(f"no place here: {', '.join(left)}")
    if any(source["format"] == "alpaca" for source in sources):
        notes.append("the model's chat template, not Alpaca's words")
    return {field: sources}, "; ".join(notes)


def _factory(field: str, names: str, given: Given) -> Meaning:
    folder = Path(given.get("dataset_dir", "data"))
    infos = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    entries = []
    for name in names.split(","):
        info = dict(infos[name.strip()])
        path = info.pop("hf_hub_url", None) or str(folder / info.pop("file_name"))
        entry = {
            "path": path,
            "name": info.pop("subset", None),
            "type": info.pop("formatting", "alpaca"),
        }
        text = {}
        if given["stage"] == "pt":
            text = {"type": "completion", "field": info.pop("columns", {}).get("prompt")}
        entries.append(entry | info | text)
    return _sources(field, entries, given)


def _hub(name: str, given: Given) -> Meaning:
    split = given.get("dataset_train_split")
    part = given.get("dataset_config")
    return _sources("data.train", [{"path": name, "name": part, "split": split}], given)


def _batch(micro: int, given: Given) -> Meaning:
    steps = given["gradient_accumulation_steps"]
    known = given.get("num_processes", given.get("ray_num_workers"))
    gpus = known or 1
    note = f"{micro} at once x {steps} accumulated x {plural(gpus, 'GPU')}"
    if not known:
        note += "; the file does not say how many GPUs: multiply train.global_batch by their number"
    return {"train.micro_batch": micro, "train.global_batch": micro * steps * gpus}, note


def _warmup(value: float, given: Given) -> Meaning:
    if value < 1:
        return {"train.warmup": value}, ""
    share = round(value / given["max_steps"], 6)
    return {"train.warmup": share}, "a share of the steps, not their number"


def _dropout(share: float, given: Given) -> Meaning:
    if _of_pairs(given):
        return (
            {},
            "no dropout with preference pairs, as noise in one of two answers would be a margin",
        )
    return {"adapter.dropout": share}, ""


def _name(path: str, _: Given) -> Meaning:
    name = re.sub(r"[^A-Za-z0-9]+", "-", path).strip("-")[:100]
    return {"run.name": name, "registry.model": name}, "a run is a folder of run.storage, ./runs"


COMPUTED: dict[str, Callable[[Any, Given], Meaning]] = {
    "datasets": partial(_sources, "data.train"),
    "test_datasets": partial(_sources, "data.eval"),
    "dataset": partial(_factory, "data.train"),
    "eval_dataset": partial(_factory, "data.eval"),
    "dataset_name": _hub,
    "lora_rank": lambda rank, given: (
        {"adapter.rank": rank, "adapter.alpha": given.get("lora_alpha", 2 * rank)},
        "",
    ),
    "lora_target": lambda x, _: (
        {"adapter.targets": "all-linear" if x == "all" else re.split(r",\s*", x)},
        "",
    ),
    "lora_dropout": _dropout,
    "micro_batch_size per_device_train_batch_size": _batch,
    "warmup_ratio warmup_steps": _warmup,
    "deepspeed": lambda x, _: (
        {"cluster.strategy": "fsdp"} if re.search("z(ero)?_?3", x) else {},
        "fsdp if ZeRO-3",
    ),
    "output_dir run_name": _name,
}
PARTS = (TABLE["trained"], TABLE["fields"], COMPUTED, TABLE["as_it_is"])
READ: dict[str, Any] = {
    name: how for part in PARTS for names, how in part.items() for name in names.split()
}


def _meaning(name: str, value: Any, given: Given) -> Meaning:
    how = READ[name]
    if how is None:
        return {str(meant(name)): value}, ""
    if not isinstance(how, dict):
        return how(value, given)  # type: ignore[no-any-return]
    key = value if isinstance(value, str) else json.dumps(value)
    ours: Any = how.get(key, how.get("*"))
    if isinstance(ours, str):
        return {}, ours
    ours = {field: value if its == "*" else its for field, its in ours.items()}
    return ours, ours.pop("note", "")


def convert(file: str, changes: Given) -> tuple[Given, list[str]]:
    """Return another tool's config as ours, with `changes`, and lines that name each of its fields."""
    own = _settings(file)
    tools = TABLE["tools"]
    tool = next((tool for tool in tools if own.keys() & set(tools[tool]["own"].split())), None)
    if tool is None:
        raise UserError(
            f"--from {file}: has no base_model (Axolotl) or model_name_or_path (LLaMA-Factory, TRL)"
        )
    given = tools[tool]["defaults"] | {
        name: value for name, value in own.items() if value is not None
    }
    groups: dict[str, list[str]] = {
        "these fields map": [],
        "have another meaning here": [],
        "have no place here": [],
    }
    same, other, none = groups.values()
    sets: Given = {}
    tree: Given = {"run": {}, "model": {"name": "?"}, "data": {"train": [{"path": "?"}]}}
    tree = changed(tree, _name(f"from-{Path(file).stem}", {})[0])
    for name in sorted(given, key=[*READ, *given].index):
        label = f"{name}: {json.dumps(given[name], default=str)}"
        if name not in own:
            label += f" (default of {tool})"
        try:
            ours, note = _meaning(name, given[name], given)
            build(changed(tree, ours))
        except (LookupError, TypeError, ValueError, AttributeError, OSError, UserError) as error:
            if name in " ".join(TABLE["trained"]).split():
                raise UserError(
                    f"--from {file}: {label}: only adapters are trained, on answers or by DPO on preference pairs"
                ) from None
            why = "another value than those known here"
            if isinstance(error, UserError | OSError):
                why = str(error)
            none.append(f"{label}: {why}" if name in READ else name)
            continue
        replaced = [
            f"replaces {sets[field]}"
            for field in ours
            if sets.get(field, ours[field]) != ours[field]
        ]
        tree = changed(tree, ours)
        sets |= ours
        here = [
            ", ".join(f"{field}: {value}" for field, value in ours.items()),
            note,
            *replaced[:1],
        ]
        label += f" -> {' | '.join(filter(None, here)) or 'the same here'}"
        if note or replaced:
            other.append(label)
        else:
            same.append(label)
    tree = changed(tree, changes)
    if build(tree, "arguments").data.train[0].path == "?":
        why = "; ".join(each for each in none if each.startswith("data")) or "the file names none"
        raise UserError(
            f"--from {file}: its rows are not known here: {why}; set data.train.0.path=FILE"
        )
    none += [f"{name}: it is empty" for name in own if own[name] is None]
    lines = [f"{file}, read as for {tool}; train.lr: auto would measure the learning rate"]
    for title, fields in groups.items():
        lines.append(f"{title}:")
        lines += [f"  {each}" for each in fields]
    return tree, [secrets.mask(" ".join(line.splitlines())) for line in lines]


def _settings(file: str) -> Given:
    """Return the settings in a YAML file, or those of a file with a command line."""
    with as_user_error(f"--from {file}", OSError, ValueError, reason=short_reason):
        text = Path(file).read_text(encoding="utf-8")
        if not re.search(r"^[^#:\n]*--\w", text, re.MULTILINE):
            tree = parse_yaml(text, file)
            return tree if isinstance(tree, dict) else {}
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    script = ""
    flags: dict[str, list[Any]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = flags[name.replace("-", "_")] = []
            if equals:
                values.append(parse_yaml(value, word))
        elif word.endswith(".py") or not flags:
            script = word
        else:
            values.append(parse_yaml(word, word))
    if not re.search("sft|dpo", script) and "stage" not in flags:
        raise UserError(
            f"--from {file}: {script} is not sft or dpo: only adapters are trained, on answers or by DPO on preference"
            " pairs"
        )
    settings: Given = {}
    if "dpo" in script:
        settings["beta"] = 0.1
    for name, values in flags.items():
        settings[name] = values
        if len(values) < 2:
            settings[name] = values[0] if values else True
    return settings
