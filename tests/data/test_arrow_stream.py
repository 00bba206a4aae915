"""Arrow files that `datasets` saves: each unit is read from the offset of its first batch."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc

from olora_ray.data import scan
from olora_ray.data.reader import Unit, Units, read_unit
from olora_ray.data.sources import Changed, File


def texts(rows: int) -> list[str]:
    return [f"row {number:05d}" for number in range(rows)]


def write(path: Path, batches: list[int], column: pa.Array) -> File:
    """Write a stream of batches with so many rows each."""
    schema = pa.schema([("text", column.type), ("number", pa.int64())])
    borders = np.cumsum([0, *batches]).tolist()
    with pa.OSFile(str(path), "wb") as file, ipc.new_stream(file, schema) as stream:
        for low, high in pairwise(borders):
            stream.write_batch(
                pa.record_batch([column[low:high], pa.array(range(low, high))], schema=schema)
            )
    return File(str(path), "arrow", None, path.stat().st_size, path.stat().st_mtime_ns)


def read(file: File, units: Units | list[Unit]) -> list[tuple[int, Any]]:
    return [
        found for unit in units for found in read_unit(file, unit, ("text", "number"), ["text"])
    ]


@given(batches=st.lists(st.integers(0, 9), max_size=12), dictionary=st.booleans())
def test_units_are_all_rows_in_any_order(
    batches: list[int], dictionary: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Batches have any lengths; the values of a dictionary column stand before all batches."""
    wanted = texts(sum(batches))
    column = pa.array(wanted, pa.string())
    file = write(
        tmp_path_factory.mktemp("arrow") / "a.arrow",
        batches,
        column.dictionary_encode() if dictionary else column,
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scan, "UNIT_ROWS", 2)
        found = scan.scan(file, "")
    rows = [(number, {"text": text}) for number, text in enumerate(wanted)]
    assert read(file, found.units) == rows
    assert sorted(read(file, list(found.units)[::-1]), key=lambda each: each[0]) == rows
    assert all((unit.offset > 0) != dictionary for unit in found.units)
    # Earlier versions kept scans without offsets.
    assert (
        read(file, [dataclasses.replace(unit, offset=0, before=0) for unit in found.units]) == rows
    )


@pytest.mark.parametrize("cut", [-1, -9, -3000])
def test_a_file_that_ends_too_early_is_refused(cut: int, tmp_path: Path) -> None:
    # Without its last eight bytes, which mark the end of the batches, the file still has all its rows.
    whole = write(tmp_path / "a.arrow", [100] * 5, pa.array(texts(500)))
    path = Path(whole.uri)
    path.write_bytes(path.read_bytes()[:cut])
    file = dataclasses.replace(whole, size=path.stat().st_size, modified=path.stat().st_mtime_ns)
    with pytest.raises(scan.UserError, match="not a readable arrow file"):
        scan.scan(file, "")


def test_a_file_that_is_damaged_inside_is_refused(tmp_path: Path) -> None:
    # Reading from such a file killed the process (SIGSEGV), or ended in a SystemError.
    turns = [[{"role": "user", "content": f"question {number}"}] for number in range(300)]
    whole = write(tmp_path / "whole.arrow", [100] * 3, pa.array(turns))
    content = Path(whole.uri).read_bytes()
    told = []
    for place in range(2000, len(content) - 400, len(content) // 60):
        path = tmp_path / "a.arrow"
        path.write_bytes(content[:place] + b"\xff" * 300 + content[place + 300 :])
        file = File(str(path), "arrow", None, path.stat().st_size, path.stat().st_mtime_ns)
        try:
            read(file, scan.scan(file, "").units)
        except scan.UserError as error:
            told.append(str(error))
    assert len(told) > 15
    assert all(line.startswith(f"{tmp_path}/a.arrow: not a readable arrow file: ") for line in told)


def test_a_stream_that_ends_before_the_unit_does_is_no_end_of_rows(tmp_path: Path) -> None:
    # A store may return less than asked for: the rest of the unit's rows was lost silently.
    file = write(tmp_path / "a.arrow", [100] * 50, pa.array(texts(5000)))
    first, *_, last = scan.scan(file, "").units
    for unit in (
        dataclasses.replace(last, rows=last.rows + 1),
        dataclasses.replace(first, offset=0, rows=5001),
    ):
        with pytest.raises(Changed):
            read(file, [unit])
