"""json files: read as a whole, up to a limit."""

import json
from typing import Any

from olora_ray.common.errors import UserError, first_line
from olora_ray.data.sources import File

BOM = b"\xef\xbb\xbf"
CHUNK = 8 * 2**20
DOCUMENT_BYTES = 2**30
"""Largest json file, uncompressed: as many processes as prepare it hold it, and its rows take several times more."""


def read_whole(stream: Any, file: File) -> bytes:
    """The content of a json file; raises UserError for one that is too large to be read as a whole."""
    chunks: list[bytes] = []
    total = 0
    while chunk := stream.read(CHUNK):
        chunks.append(chunk)
        total += len(chunk)
        if total > DOCUMENT_BYTES:
            raise UserError(
                f"{file.uri}: more than {DOCUMENT_BYTES >> 20} MiB of JSON, which is read as a whole;"
                " write it as .jsonl, with one object a line"
            )
    return b"".join(chunks)


def rows_of(file: File, content: bytes) -> list[Any]:
    """The rows of a json file: a list of them, or an object of columns; raises UserError for anything else."""
    try:
        tree = json.loads(content.removeprefix(BOM).decode())
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line is called .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{file.uri}:{error.lineno}: broken JSON: {error.msg}{hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file.uri}: not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{file.uri}: broken JSON: nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python takes
        raise UserError(f"{file.uri}: broken JSON: {first_line(error)}") from None
    except MemoryError:
        raise UserError(
            f"{file.uri}: not enough memory for its {len(content) / 1e6:,.0f} MB of JSON, which are read as a whole;"
            " write it as .jsonl, with one object a line"
        ) from None
    if isinstance(tree, list):
        return tree
    lists = isinstance(tree, dict) and all(isinstance(column, list) for column in tree.values())
    if lists and len({len(column) for column in tree.values()}) == 1:
        return [dict(zip(tree, values, strict=True)) for values in zip(*tree.values(), strict=True)]
    raise UserError(f"{file.uri}: expected a list of rows, or an object of columns of equal length")
