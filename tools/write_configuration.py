"""Writes docs/generated/configuration.md from the config's schema: every field with its type, default and description.

Also docs/generated/config.schema.json and space.schema.json, by which editors complete and check such files.

.venv/bin/python tools/write_configuration.py          (make docs)
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pipelines")]  # the schema of this tree, whatever is installed

from pydantic.fields import FieldInfo  # noqa: E402

from comparison.arguments import ComparedConfig  # noqa: E402
from olora_ray.config import command_line  # noqa: E402
from olora_ray.config.schema import Config, Section  # noqa: E402
from olora_ray.sweep.space import Space  # noqa: E402

PAGE = ROOT / "docs" / "generated" / "configuration.md"
INTRO = """\
# Configuration

<!-- Written by `make docs` from olora_ray/config/schema.py: change the descriptions there. -->

A run is one YAML file of sections. Only `model.name` and `data.train` are required:

```yaml
run: {name: support}
model: {name: meta-llama/Llama-3.2-1B-Instruct}
data:
  train: [{path: data/chats.jsonl}]
```

The file is validated as a whole before anything starts: an unknown field, a wrong type or a value out of range is an
error that names the field, in a line of its own. `olora-ray finetune --help all` shows this page's fields in the
terminal, and a run's folder has its configuration in `config.yaml` with every default filled in.

Editors with a YAML language server complete and check the file by [config.schema.json](config.schema.json)
(space files: [space.schema.json](space.schema.json)), if its first line is
`# yaml-language-server: $schema=PATH`; `olora-ray init` writes that line.

## On the command line

`finetune.py`, `sweep.py`, `compare.py`, `retrain.py` and `evaluate.py` take `section.field=value` words, which
override the file:

    .venv/bin/python pipelines/finetune.py my_run.yaml train.lr=2.0e-4 adapter.rank=32 cluster.workers='[2, 8]'
    .venv/bin/python pipelines/finetune.py my_run.yaml registry.model=null data.train.0.weight=2

Values are YAML: `null` unsets a field, `[2, 8]` is a list, `true` a switch; quote what the shell would take apart. An
entry of a list is named by its number, counted from 0. Fields that a search varies have the same dotted names in its
space file. `train.epochs` here takes the place of `train.steps` in the file.

## Secrets

A configuration is copied into checkpoints and MLflow, so it holds no secrets: an address with a password or token in
it is refused. `tracking.uri` and `notify.url` may name a place instead, `env:NAME` for an environment variable or
`file:/PATH` for a file of one line. It is looked up where it is used, and what it holds is never written:

    .venv/bin/python pipelines/finetune.py my_run.yaml tracking.uri=env:MLFLOW_DATABASE
    .venv/bin/python pipelines/finetune.py my_run.yaml tracking.uri=file:/run/secrets/mlflow_uri

Other secrets come from the variables that their libraries read, on every node: `MLFLOW_TRACKING_USERNAME` and
`MLFLOW_TRACKING_PASSWORD` (or `MLFLOW_TRACKING_TOKEN`), `HF_TOKEN`, and the cloud's own.
"""


SCHEMAS: dict[str, type[Section]] = {"config": ComparedConfig, "space": Space}
"""Kind of file -> the section that it is; a config may have the section of a comparison."""


def main() -> None:
    """Write the page and the schemas."""
    PAGE.write_text(page(), encoding="utf-8")
    for kind in SCHEMAS:
        schema_file(kind).write_text(schema(kind), encoding="utf-8")


def schema_file(kind: str) -> Path:
    """Where the schema of a kind of file lies."""
    return ROOT / "docs" / "generated" / f"{kind}.schema.json"


def schema(kind: str) -> str:
    """The schema of a kind of file, with the fields' docstrings as descriptions."""
    return json.dumps(SCHEMAS[kind].model_json_schema(), indent=1, ensure_ascii=False) + "\n"


def page() -> str:
    """The page, from the schema as it is."""
    return "\n".join([INTRO, *(line for name, field in Config.model_fields.items() for line in _section(name, field))])


def _section(name: str, field: FieldInfo) -> Iterator[str]:
    section = next(_parts(field.annotation))
    yield f"\n## `{name}`\n\n{section.__doc__}\n"
    yield _table(section)
    for entry in dict.fromkeys(_inside(section)):
        yield f"\n### {_heading(entry)}\n\n{entry.__doc__}\n"
        yield _table(entry)


def _table(section: type[Section]) -> str:
    lines = ["| field | type | default | description |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        value = command_line.default(field) if field.is_required() else f"`{command_line.default(field)}`"
        kind = command_line.shape(field.annotation, field.metadata, _link)
        cells = (f"`{field.alias or name}`", kind, value, " ".join((field.description or "").split()))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _inside(section: type[Section]) -> Iterator[type[Section]]:
    """The sections that the fields of one hold, such as the entries of its lists."""
    for field in section.model_fields.values():
        for part in _parts(field.annotation):
            yield part
            yield from _inside(part)


def _parts(annotation: Any) -> Iterator[type[Section]]:
    if _is_section(annotation):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _link(section: type[Section]) -> str:
    return f"[{command_line.name_of(section)}](#{_anchor(_heading(section))})"


def _heading(section: type[Section]) -> str:
    return f"Fields of a {command_line.name_of(section)}"


def _anchor(heading: str) -> str:
    """How GitHub links to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    main()
