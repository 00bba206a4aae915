"""Rows of prompts and answers, the two files with them that a comparison reads, and the arguments of their script.

DIR/train.jsonl      rows to train on
DIR/heldout.jsonl    tuning rows and test rows; `olora-ray compare` divides them, by whole groups
DIR/rows.json        source, counts, and sha256 of both files; written last
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.config import command_line


@dataclass(frozen=True)
class Request:
    out: Path
    wheel: str | None
    rows: int
    heldout: int
    seed: int
    longest: int


def read_request(argv: list[str], usage: str) -> Request:
    """Return the arguments of a script, whose `usage` has their meaning."""
    defaults = {"--rows": "1024", "--heldout": "448", "--seed": "7", "--longest": "400"}
    found = command_line.parse(argv, usage=usage, options=("--out", "--wheel", *defaults))
    given = found.options
    if found.words or "--out" not in given:
        raise UserError(
            f"argument {found.words[0]}: unknown" if found.words else "argument --out: missing"
        )
    rows, heldout, seed, longest = (
        positive(name, given.get(name, value)) for name, value in defaults.items()
    )
    return Request(Path(given["--out"]), given.get("--wheel"), rows, heldout, seed, longest)


@dataclass(frozen=True)
class Row:
    prompt: str
    completion: str
    group: str
    """Rows of one group are in the same set, and count as one in the statistics (`gate.group: group`)."""

    def line(self) -> str:
        row = {"prompt": self.prompt, "completion": self.completion, "group": self.group}
        return json.dumps(row, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Sets:
    train: tuple[Row, ...]
    heldout: tuple[Row, ...]


def normalised(text: str) -> str:
    """Return the text without case, kinds of spaces and variants of letters: equal results mean the same question."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shared(sets: Sets) -> list[str]:
    """Return prompts (without case and spaces) and groups that both sets have; there must be none."""
    prompts = {normalised(row.prompt) for row in sets.train} & {
        normalised(row.prompt) for row in sets.heldout
    }
    groups = {row.group for row in sets.train} & {row.group for row in sets.heldout}
    return sorted(prompts | groups)


def write(folder: Path, sets: Sets, about: Mapping[str, object]) -> dict[str, str]:
    """Write both files and rows.json, and print what they have; return file name -> sha256.

    Raises UserError if the folder cannot be written, or has files that this script did not write.
    """
    assert not shared(sets), f"training and held-out rows share {shared(sets)[:3]}"
    of = {"train.jsonl": sets.train, "heldout.jsonl": sets.heldout}
    # rows.json is the sign that this script wrote the files, which it may then replace.
    if not (folder / "rows.json").exists() and (
        theirs := [name for name in of if (folder / name).exists()]
    ):
        raise UserError(
            f"--out {folder}: its {theirs[0]} was not written by this script; choose another folder"
        )
    with as_user_error(f"--out {folder}: cannot be written", OSError, reason=short_reason):
        folder.mkdir(parents=True, exist_ok=True)
        digests = {name: _written(folder / name, rows) for name, rows in of.items()}
        files = {name: {"rows": len(rows), "sha256": digests[name]} for name, rows in of.items()}
        (folder / "rows.json").write_text(
            json.dumps({**about, "files": files}, indent=1) + "\n", encoding="utf-8"
        )
    for name, rows in of.items():
        print(f"{folder / name}: {len(rows)} rows, sha256 {digests[name]}")
    return digests


def positive(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"argument {name}: expected a whole number from 1, not {text!r}")
    return int(text)


def lacking(option: str, wanted: int, rows: Sequence[Row]) -> UserError:
    remedy = "ask for fewer, or set --longest higher"
    return UserError(f"argument {option} {wanted}: only {len(rows)} rows are left; {remedy}")


def _written(path: Path, rows: Iterable[Row]) -> str:
    content = "".join(row.line() for row in rows).encode()
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
