"""Writes docs/generated/configuration.md from the config's schema: every field with its type, default and description.

Also writes config.schema.json and space.schema.json there, with which editors complete and check such files.

.venv/bin/python tools/write_configuration.py          (make docs)
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "pipelines" / "contrib"),
]  # this tree first, because another release may be installed

from pydantic.fields import FieldInfo  # noqa: E402

from comparison.arguments import ComparedConfig  # noqa: E402
from olora_ray.config import command_line  # noqa: E402
from olora_ray.config.load import SYNONYMS  # noqa: E402
from olora_ray.config.schema import Config  # noqa: E402
from olora_ray.config.section import Section, described  # noqa: E402
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

The complete file is validated before anything starts. An unknown field, a wrong type or a value out of range is an
error of one line that names the field. `olora-ray finetune --help all` shows the fields of this page in the terminal.
The run folder contains the configuration with all defaults, in `config.yaml`.

Editors with a YAML language server complete and check the file with [config.schema.json](config.schema.json)
(space files: [space.schema.json](space.schema.json)) if its first line is
`# yaml-language-server: $schema=PATH`; `olora-ray init` writes this line.

## On the command line

`finetune.py`, `sweep.py`, `compare.py`, `retrain.py` and `evaluate.py` accept arguments of the form
`section.field=value`, which override the file:

    .venv/bin/python pipelines/finetune.py my_run.yaml train.lr=2.0e-4 adapter.rank=32 cluster.workers='[2, 8]'
    .venv/bin/python pipelines/finetune.py my_run.yaml registry.model=null data.train.0.weight=2

Values are YAML: `null` unsets a field, `[2, 8]` is a list, `true` is a boolean. Quote values that the shell would
split. An entry of a list is named by its index, counted from 0. Space files of searches use the same dotted names. On
the command line, `train.epochs` overrides `train.steps` of the file.

## Names of other libraries

These names of Hugging Face's libraries and of MLflow work in the field's section, in a file and on the command line,
and the log says how each is read. A field that is set under two names is an error. Other names of theirs are refused
with advice: `per_device_train_batch_size` counts rows, but `train.micro_batch` counts packs.

{synonyms}

## Secrets

Runs copy the configuration into checkpoints and MLflow, so it must not contain secrets: an address with a password or a
token is refused. `tracking.uri` may instead be `env:NAME`, for an environment variable with the address, or
`file:/PATH`, for a file of one line; `notify.url` and `retrain.ping` are always one of the two. A process reads the
address when it needs it, and never writes it:

    .venv/bin/python pipelines/finetune.py my_run.yaml tracking.uri=env:MLFLOW_DATABASE
    .venv/bin/python pipelines/finetune.py my_run.yaml tracking.uri=file:/run/secrets/mlflow_uri

Other secrets come from environment variables that the libraries read, on every node: `MLFLOW_TRACKING_USERNAME` and
`MLFLOW_TRACKING_PASSWORD` (or `MLFLOW_TRACKING_TOKEN`), `HF_TOKEN`, and the variables of the cloud.
"""


SCHEMAS: dict[str, type[Section]] = {"config": ComparedConfig, "space": Space}
"""File type -> its schema; a config may also have the section `compare` of a comparison."""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    for name in SCHEMAS:
        schema_file(name).write_text(schema(name), encoding="utf-8")


def schema_file(name: str) -> Path:
    return ROOT / "docs" / "generated" / f"{name}.schema.json"


def schema(name: str) -> str:
    """Return a JSON schema, with the fields' docstrings as descriptions."""
    return json.dumps(SCHEMAS[name].model_json_schema(), indent=1, ensure_ascii=False) + "\n"


def page() -> str:
    return "\n".join(
        [
            INTRO.replace("{synonyms}", _synonyms()),
            *(
                line
                for name, field in Config.model_fields.items()
                for line in _section(name, field)
            ),
        ]
    )


def _synonyms() -> str:
    names: dict[str, list[str]] = {}
    for name, field in SYNONYMS.items():
        names.setdefault(field, []).append(f"`{name.partition('.')[2]}`")
    rows = [f"| `{field}` | {', '.join(others)} |" for field, others in names.items()]
    return "\n".join(["| field | other names |", "|---|---|", *rows])


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
        value = (
            command_line.default(field)
            if field.is_required()
            else f"`{command_line.default(field)}`"
        )
        accepted = command_line.shape(field.annotation, field.metadata, _link)
        cells = (
            f"`{field.alias or name}`",
            accepted,
            value,
            " ".join(described(field).split()),
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _inside(section: type[Section]) -> Iterator[type[Section]]:
    # Sections may contain lists of sections, such as the sources in `data.train`, which need tables too.
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
    # GitHub derives the anchor of a heading in this way.
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    main()
