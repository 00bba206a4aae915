"""Writes docs/generated/datasets.md: what is read of popular data sets, from their rows in tests/data/published.yaml.

.venv/bin/python tools/write_datasets.py          (make docs)
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this tree first, because another release may be installed

from olora_ray.common.errors import UserError  # noqa: E402
from olora_ray.config.section import Source  # noqa: E402
from olora_ray.data import detect  # noqa: E402

PAGE = ROOT / "docs" / "generated" / "datasets.md"
ROWS = ROOT / "tests" / "data" / "published.yaml"
HEAD = """\
# Popular data sets

<!-- Written by `make docs` from tests/data/published.yaml. -->

What `olora-ray init` reads of a row in the published schema of each set. A test compares it with the text that should
be supervised. The rows were written for this table, most from memory: a set may have changed.

| set | read as | left out |
|---|---|---|
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    lines = []
    for entry in yaml.safe_load(ROWS.read_text(encoding="utf-8")):
        read, left = _cells(entry["row"])
        lines.append(f"| {entry['set']} | {read} | {left} |\n")
    return HEAD + "".join(sorted(lines, key=str.lower))


def _cells(row: dict[str, Any]) -> tuple[str, str]:
    try:
        source = found(row).source
    except UserError as question:
        asked = str(question).removeprefix("data.train.0: ").partition("?")[0]
        return f"asked: {asked.rpartition('rows.jsonl:1: ')[2]}?", ""
    mapped = [f"{name}: {column}" for name, column in source.fields.items() if column != "none"]
    left = [name for name, column in source.fields.items() if column == "none"]
    return f"{source.format} {', '.join(mapped)}".strip(), ", ".join(left)


def found(row: dict[str, Any]) -> detect.Found:
    """Return what the first look makes of twelve such rows; raise UserError if it asks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text(f"{json.dumps(row)}\n" * 12, encoding="utf-8")
        return detect.find_format(Source(path=str(file)), "data.train.0", folder)


if __name__ == "__main__":
    main()
