"""A record is the value that was written, or None; a storage that cannot be read is an error."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from olora_ray.common import records


@dataclass(frozen=True)
class Ended:
    step: int
    losses: tuple[float, ...] = ()
    rows: dict[int, float] | None = None


ENDED = Ended(7, (0.1 + 0.2, float("inf")), {3: 1 / 3})


@pytest.mark.parametrize("sealed", [False, True])
def test_a_record_comes_back_exactly_and_its_text_is_plain_json(
    tmp_path: Path, sealed: bool
) -> None:
    file = tmp_path / "new" / "a.json"
    records.write(str(file), ENDED, indent=1, end="\n", sealed=sealed)
    assert records.read(str(file), Ended, sealed) == ENDED
    tree = json.loads(file.read_text())
    assert list(tree) == ["step", "losses", "rows", *["seal"] * sealed]
    assert file.read_text() == json.dumps(tree, indent=1) + "\n"


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"null", b"[]", b"{}", b'{"step": "many"}', b'{"step": 7', b"[" * 10**5],
)
def test_anything_else_is_none(tmp_path: Path, content: bytes, sealed: bool) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert records.read(str(tmp_path / "a.json"), Ended, sealed) is None


def test_a_missing_file_is_none_and_a_changed_one_breaks_its_seal(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert records.read(str(file), Ended) is records.read(str(file / "b.json"), Ended) is None
    records.write(str(file), ENDED, sealed=True)
    file.write_text(file.read_text().replace('"step": 7', '"step": 8'))
    assert records.read(str(file), Ended, sealed=True) is None
    assert records.read(str(file), Ended) is not None


def test_a_file_that_cannot_be_read_is_not_missing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        records.read(str(tmp_path), Ended)
