"""Identity of a model: digests of its weights and of the other files that decide what it computes.

It is one text, `WEIGHTS+FILES`. Checkpoints and registered versions of before November 2026 carry WEIGHTS alone, and
are compared by that part.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from olora_ray.common import copies, digests, kept, storage
from olora_ray.model.folder import weight_files

PIECES, PIECE = 64, 4096
"""Pieces of a file of weights that a glance reads, and the bytes of each."""
KEPT_FROM = 2**30
"""Bytes from which the digest of a file of weights is kept: an unchanged retraining says so within seconds."""
_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
"""Config, generation config, index, tokenizer, chat templates."""
_CODE = "*.py"
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
_UNIMPORTANT = ("transformers_version", "_name_or_path", "name_or_path")
"""Fields that change when the same model is saved again, or from another place."""
_SEPARATOR = "+"


def of_folder(folder: Path, code: bool) -> str:
    """The identity of a model folder; `code` says whether Python code in it would be run, and so is a part of it."""
    return of_weights(weight_files(folder)) + _SEPARATOR + digests.digest(_others(folder, code))


def look(folder: Path, code: bool) -> str:
    """What a glance tells of a model folder: its small files, and of its weights names, sizes and pieces of each file.

    Another model has another one, and so has one of which files are missing; `code` as in `of_folder`.
    """
    weights = "".join(f"{file.name}:{_pieces(file)}\n" for file in weight_files(folder))
    return digests.digest(_others(folder, code), weights)


def of_weights(files: Sequence[Path]) -> str:
    """SHA-256 over names and contents."""
    return digests.digest("".join(f"{file.name}:{_digest_of_weights(file)}\n" for file in files))


def same(known: str | None, now: str) -> bool:
    """Whether a model is the one that was used; of an identity of before November 2026 only the weights are known."""
    return known == now or (bool(known) and known == weights(now))


def weights(identity: str) -> str:
    """The part of an identity that is the digest of the weights."""
    return identity.partition(_SEPARATOR)[0]


def _others(folder: Path, code: bool) -> str:
    """A line for each file beside the weights."""
    patterns = (*_PATTERNS, _CODE) if code else _PATTERNS
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return "".join(f"{file.relative_to(folder).as_posix()}:{_digest_of_text(file)}\n" for file in files)


def _pieces(file: Path) -> str:
    """Digest of a file's size and of pieces from its begin to its end: of a small file that is all of it."""
    size, read = file.stat().st_size, []
    with file.open("rb") as stream:
        for place in (*range(0, size, max(PIECE, size // PIECES)), max(0, size - PIECE)):
            stream.seek(place)
            read.append(stream.read(PIECE))
    return digests.digest(size, digests.digest_bytes(b"".join(read)))


def _digest_of_weights(file: Path) -> str:
    """Of a file's content; for a large file kept on this node, for as long as its size and time of change hold."""
    info = file.stat()
    key = digests.digest(file.resolve(), info.st_size, info.st_mtime_ns, length=32)
    place = storage.join(copies.CACHE, "digests", key)
    if info.st_size >= KEPT_FROM and (known := kept.read(place)):
        return known
    found = digests.digest_file(file)
    if info.st_size >= KEPT_FROM:
        kept.keep(place, found)  # a home that is read-only, or full, is no reason not to train
    return found


def _digest_of_text(file: Path) -> str:
    if file.name in _CONFIGS:
        try:
            tree = json.loads(file.read_bytes())
            fields = {name: value for name, value in tree.items() if name not in _UNIMPORTANT}
            return digests.digest_json(fields)
        except (ValueError, AttributeError, RecursionError):  # damaged: loading it says so
            pass
    return digests.digest_file(file)
