"""Records: our own JSON files as typed values, such as dataclasses.

A record that is missing or damaged is None: whoever reads it does the work again, as if it had never been done. A
storage that cannot be reached raises an OSError, because None would then repeat work that is finished. A sealed record
contains a digest of its content (field `seal`), so that a changed file counts as damaged.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter

from olora_ray.common import storage
from olora_ray.common.storage import digest_json

Record = TypeVar("Record")


def read(location: str, form: type[Record], sealed: bool = False) -> Record | None:
    """Return the record in a file; None if the file is missing, damaged or of another form. Raises OSError."""
    try:
        content = storage.read_bytes(location)
    except (FileNotFoundError, NotADirectoryError):
        # NotADirectoryError: a stray file instead of a folder.
        return None
    return parsed(content, form, sealed)


def write(
    location: str,
    record: Any,
    indent: int | None = None,
    end: str = "",
    sealed: bool = False,
    durable: bool = True,
) -> None:
    """Write a dataclass or a JSON value as the text of a file, and `end` after it. Raises OSError."""
    storage.write_text(location, text_of(record, indent, sealed) + end, durable)


def text_of(record: Any, indent: int | None = None, sealed: bool = False) -> str:
    if is_dataclass(record) and not isinstance(record, type):
        record = asdict(record)
    if sealed:
        return seal(record, indent)
    return json.dumps(record, indent=indent)


def parsed(text: str | bytes, form: type[Record], sealed: bool = False) -> Record | None:
    """Return the record in a text; None if the text is damaged or of another form."""
    try:
        tree = json.loads(text)
        if sealed and not (isinstance(tree, dict) and tree.pop("seal", None) == digest_json(tree)):
            return None
        record: Record = _adapter(form).validate_python(tree)  # type: ignore[arg-type] # mypy: no type is hashable
        return record
    except (ValueError, RecursionError):
        return None


_adapter = cache(TypeAdapter)  # building one takes milliseconds


def seal(tree: Mapping[str, Any], indent: int | None = None) -> str:
    """Return the tree as JSON, with the digest of its content in the field `seal`."""
    return json.dumps({**tree, "seal": digest_json(tree)}, indent=indent)
