"""SHA-256 digests as hex: they name stores, caches and runs, so the text behind each must never change."""

import hashlib
import json
from pathlib import Path
from typing import Any

WHOLE = 64
"""Hex digits of a whole digest."""


def digest(*parts: object, length: int = WHOLE) -> str:
    """The first `length` hex digits of the digest of the parts, with a space between them."""
    return digest_bytes(" ".join(map(str, parts)).encode())[:length]


def digest_json(value: object, length: int = WHOLE) -> str:
    """As `digest`, of the value as JSON with sorted keys."""
    return digest(json.dumps(value, sort_keys=True), length=length)


def digest_bytes(content: bytes) -> str:
    """The digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def digest_file(file: Path) -> str:
    """The digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_and_digest(file: Path) -> dict[str, Any]:
    """The entry of a file in a manifest: {bytes, sha256}."""
    return {"bytes": file.stat().st_size, "sha256": digest_file(file)}
