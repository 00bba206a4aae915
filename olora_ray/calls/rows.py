"""Rows in memory as a source: a list or iterable of dicts, a pandas DataFrame, or a Dataset of Hugging Face.

They are written as JSON lines, in a file whose name is a digest of its content. So equal rows are the same source.
"""

import io
import json
from os import PathLike, fspath
from typing import Any

from olora_ray.common import storage
from olora_ray.common.errors import UserError

Given = Any
"""A path, a list of paths, or rows in memory."""


def sources(data: Given, argument: str) -> tuple[list[Any], str]:
    """Return the sources that `data` names, and the content of their file if it is rows in memory.

    Raises UserError that begins with `argument` if there are no rows, or if one has no JSON form.
    """
    if isinstance(data, str | PathLike):
        data = [data]
    try:
        if isinstance(data, list | tuple) and data and isinstance(data[0], str | PathLike):
            return [*map(fspath, data)], ""
        text = _json_lines(data)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{argument}: expected paths, or rows as a list of dicts, a DataFrame or a Dataset ({error})"
        ) from None
    if not text:
        raise UserError(f"{argument}: no rows")
    # A Dataset has numbers as labels, and their names beside them.
    features = getattr(data, "features", {}).items()
    labels = {column: feature.names for column, feature in features if hasattr(feature, "names")}
    return [{"path": f"{storage.digest(text, length=16)}.jsonl", "labels": labels}], text


def write(found: list[Any], text: str, folder: str) -> None:
    """Write the content of a source of `sources` into a folder, and set its path to that file."""
    path = storage.join(folder, found[0]["path"])
    found[0]["path"] = path
    # Named by its content, so a file that is there is complete and right.
    if not storage.exists(path):
        storage.write_text(path, text)


def _json_lines(data: Given) -> str:
    if hasattr(data, "to_json"):
        content = io.BytesIO()
        data.to_json(content, orient="records", lines=True, force_ascii=False, date_format="iso")
        return content.getvalue().decode()
    lines = []
    for number, row in enumerate(data):
        if not isinstance(row, dict):
            raise TypeError(
                f"row {number} is a {type(row).__name__}; of several splits pass one: splits['train']"
            )
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return "".join(lines)
