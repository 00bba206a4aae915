"""Rows of prompts and answers, and the two files of them that a comparison reads.

DIR/train.jsonl      to train on
DIR/heldout.jsonl    the tuning rows and the test rows; pipelines/compare.py divides them, by whole groups
DIR/rows.json        where they are from, how many, sha256 of both files; written last
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from olora_ray.common.errors import UserError, as_user_error, short_reason


@dataclass(frozen=True)
class Row:
    """One example of the format prompt_completion."""

    prompt: str
    completion: str
    group: str
    """Rows of one group lie in one set, and count as one in the statistics (`gate.group: group`)."""

    def line(self) -> str:
        """As a line of jsonl."""
        row = {"prompt": self.prompt, "completion": self.completion, "group": self.group}
        return json.dumps(row, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Sets:
    """The rows of a task."""

    train: tuple[Row, ...]
    heldout: tuple[Row, ...]


def normalised(text: str) -> str:
    """A text without case, kinds of blanks, and ways to write the same letter: equal ones are the same question."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def rank(*parts: object) -> str:
    """A key that sorts things in an order that has nothing to do with them, and is the same everywhere."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def shared(sets: Sets) -> list[str]:
    """What both sets have, as it must not be: prompts but for case and blanks, and groups."""
    prompts = {normalised(row.prompt) for row in sets.train} & {normalised(row.prompt) for row in sets.heldout}
    groups = {row.group for row in sets.train} & {row.group for row in sets.heldout}
    return sorted(prompts | groups)


def write(folder: Path, sets: Sets, about: Mapping[str, object]) -> dict[str, str]:
    """Write both files and what is known of them; gives file name -> sha256.

    Raises UserError rather than overwrite files that were not written here, and for a folder that cannot be written.
    """
    assert not shared(sets), f"training and held-out rows share {shared(sets)[:3]}"
    names = ("train.jsonl", "heldout.jsonl")
    if not (folder / "rows.json").exists() and (theirs := [name for name in names if (folder / name).exists()]):
        raise UserError(f"--out {folder}: its {theirs[0]} was not written by this script; choose another folder")
    with as_user_error(f"--out {folder}: cannot be written", OSError, reason=short_reason):
        folder.mkdir(parents=True, exist_ok=True)
        digests = {
            name: _written(folder / name, rows) for name, rows in zip(names, (sets.train, sets.heldout), strict=True)
        }
        files = {
            name: {"rows": len(rows), "sha256": digests[name]}
            for name, rows in zip(names, (sets.train, sets.heldout), strict=True)
        }
        _written_whole(folder / "rows.json", json.dumps({**about, "files": files}, indent=1) + "\n")
    return digests


def positive(name: str, text: str) -> int:
    """The value of an option that counts rows; raises UserError for anything but a whole number from 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"argument {name}: expected a whole number from 1, not {text!r}")
    return int(text)


def lacking(option: str, wanted: int, found: Sequence[Row] | int, remedy: str) -> UserError:
    """The error for a set that the data does not fill."""
    count = found if isinstance(found, int) else len(found)
    return UserError(f"argument {option} {wanted}: only {count} rows are left for it; {remedy}")


def _written(path: Path, rows: Iterable[Row]) -> str:
    text = "".join(row.line() for row in rows)
    _written_whole(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def _written_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text.encode())
    partial.replace(path)
