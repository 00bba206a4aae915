"""No command trains on a file that ends in the middle of a row, such as one that is still being copied."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.data import detect
from olora_ray.tokens import prepare, preview
from tests.tokens import helpers

ROWS = "".join(
    json.dumps({"text": f"größer als {number}"}, ensure_ascii=False) + "\n"
    for number in range(1000)
)
CELLS = "text,number\n" + "".join(f"more than {number},{number}\n" for number in range(1000))
CUT: dict[str, tuple[bytes, int]] = {
    "text.jsonl": (ROWS[:-6].encode(), 1000),
    "letter.jsonl": (ROWS.encode()[: ROWS.encode().rindex("ß".encode()) + 1], 1000),
    "zeros.jsonl": (ROWS[:-6].encode() + bytes(4096), 1000),
    "only.jsonl": (b'\xef\xbb\xbf{"text": "a', 1),
    "text.jsonl.gz": (gzip.compress(ROWS[:-6].encode()), 1000),
    "cells.csv": (CELLS[:-5].encode(), 1001),
}
WHOLE: dict[str, bytes] = {
    "no newline.jsonl": ROWS[:-1].encode(),
    "blanks.jsonl": ROWS.encode() + b"  ",
    "no newline.csv": CELLS[:-1].encode(),
    "old Macintosh.csv": CELLS.replace("\n", "\r").encode(),
}
LOOKS: dict[str, Callable[[Config], object]] = {
    "first look": detect.check_data,
    "dry run": lambda config: preview.describe(config, helpers.spec()),
    "preparation": lambda config: prepare.begin(config, helpers.spec(), "train"),
    "retraining": lambda config: prepare.plan_here(config, helpers.spec(), "train"),
}


def config_of(folder: Path, name: str, content: bytes) -> Config:
    (folder / name).write_bytes(content)
    return helpers.config(folder / "runs", {"path": str(folder / name), "format": "text"})


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("look", LOOKS)
def test_a_file_that_ends_in_the_middle_of_a_row_is_refused(
    look: str, name: str, tmp_path: Path
) -> None:
    content, line = CUT[name]
    with pytest.raises(UserError) as caught:
        LOOKS[look](config_of(tmp_path, name, content))
    assert str(caught.value) == (
        f"{tmp_path / name}:{line}: the file ends in the middle of a row: it is incomplete, or still being copied;"
        " copy it completely, then run the same command again"
    )


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("look", LOOKS)
def test_a_last_row_needs_no_newline(look: str, name: str, tmp_path: Path) -> None:
    LOOKS[look](config_of(tmp_path, name, WHOLE[name]))


@pytest.mark.parametrize(
    "content",
    [
        b'[\n{"text": "a"},\n{"text": "b"}]',
        b'{\n"text": "a"\n}',
        b'{"text": "a"}\n' * 9 + b"{'text': 'b'}",
    ],
)
def test_what_is_no_row_at_all_is_not_called_incomplete(content: bytes, tmp_path: Path) -> None:
    prepare.begin(config_of(tmp_path, "a.jsonl", content), helpers.spec(), "train")
