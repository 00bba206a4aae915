"""A csv file has the rows that csv.reader reads from it."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olora_ray.common.errors import UserError
from olora_ray.data import reader, scan
from olora_ray.data.sources import COMPRESSIONS, File

SPECIAL = ['"', '""', ",", "\n", "\r", "\r\n", "\t", " ", "a", 'a"', '"a', "é", "\u2028", "\x00"]
ANYTHING = st.lists(st.sampled_from(SPECIAL), max_size=60).map("".join)
CELLS = st.lists(st.sampled_from(SPECIAL), max_size=6).map("".join)
ROWS = st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=40)


def file_of(folder: Path, content: bytes, name: str = "a.csv") -> File:
    path = folder / name
    path.write_bytes(content)
    kind = "tsv" if ".tsv" in name else "csv"
    state = path.stat()
    return File(str(path), kind, COMPRESSIONS.get(path.suffix), state.st_size, state.st_mtime_ns)


def read(file: File) -> tuple[tuple[str, ...], list[tuple[int, Any]]]:
    """Return header and rows, read unit by unit from the last to the first."""
    found = scan.scan(file, "")
    file = found.file or file
    parts = [
        list(reader.read_unit(file, unit, found.columns, ())) for unit in reversed(found.units)
    ]
    return found.columns, [row for part in reversed(parts) for row in part]


def expected(text: str, delimiter: str = ",") -> tuple[tuple[str, ...], list[tuple[int, Any]]]:
    """Return header and rows, read by csv.reader alone, as its documentation says."""
    rows, place = [], 0
    parsed = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    for cells in parsed:
        rows.append((place, cells))
        place = parsed.line_num
    rows = [(place, cells) for place, cells in rows if cells]
    return (tuple(rows[0][1]), rows[1:]) if rows else ((), [])


def closed(text: str, delimiter: str = ",") -> bool:
    """True if all quoted cells end: only then is a record after the text a separate one."""
    end = text if text.endswith(("\n", "\r")) or not text else f"{text}\n"
    cells = list(csv.reader(io.StringIO(f"{end}{delimiter}", newline=""), delimiter=delimiter))
    return bool(cells) and cells[-1] == ["", ""]


def check(folder: Path, text: str, name: str = "a.csv", start: bytes = b"") -> None:
    by_comma, by_tab = (sum(map(bool, map(str.strip, expected(text, mark)[0]))) for mark in ",\t")
    delimiter = "\t" if "tsv" in name or by_comma < 2 <= by_tab else ","
    file = file_of(folder, start + text.encode(), name)
    header, rows = expected(text, delimiter)
    named = [cell for cell in header if cell]
    if not closed(text, delimiter):
        with pytest.raises(
            UserError,
            match=r"a\.[ct]sv:\d+: the record that begins here has a quoted cell that is not closed",
        ):
            scan.scan(file, "")
    elif rows and not text.endswith(("\n", "\r")) and len(rows[-1][1]) < len(header):
        with pytest.raises(UserError, match=r"a\.[ct]sv:\d+: the file ends in the middle of a row"):
            scan.scan(file, "")
    elif len(set(named)) < len(named):
        with pytest.raises(UserError):
            scan.scan(file, "")
    else:
        assert read(file)[0] == header
        for (place, row), (line, cells) in zip(read(file)[1], rows, strict=True):
            assert place == line
            if len(cells) == len(header):
                assert row == dict(zip(header, cells, strict=True))
            else:
                assert row.reason == "broken_csv"


def written(rows: list[list[str]], end: str, cut: bool, quoting: int) -> str:
    """Return what csv.writer makes of the rows; `cut` leaves out the last end of a line."""
    sink = io.StringIO(newline="")
    csv.writer(sink, lineterminator=end, quoting=quoting).writerows([["x", "y", "z"], *rows])  # type: ignore[arg-type]
    return sink.getvalue().removesuffix(end if cut else "")


WRITTEN = st.builds(
    written, ROWS, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.sampled_from([0, 1])
)


@settings(max_examples=400, deadline=None)
@given(
    text=ANYTHING | WRITTEN,
    size=st.sampled_from([1, 7, 2**17]),
    start=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_any_text_gives_the_rows_of_csv_reader(
    text: str, size: int, start: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "CHUNK": size,
            "UNIT_BYTES": size,
            "UNIT_ROWS": 4,
            "UNITS_WANTED": 4,
        }.items():
            patch.setattr(scan, name, value)
        for name in ("a.csv", "a.tsv"):
            check(tmp_path_factory.getbasetemp(), text, name, start)
