"""The form of a text file by its first bytes, and cases in which the form by its name stays."""

from pathlib import Path

import pytest

from olora_ray.data import scan
from olora_ray.data.reader import read_unit
from tests.data.reading import listed

UTF_8 = None
WRITTEN: dict[str, tuple[str, bytes, str, str | None]] = {
    "commas": ("a.csv", b"q,a\nx;y;z,1\n", "csv", UTF_8),
    "quoted": ("a.csv", b'"q";"a"\n1;2,3\n', "semicolon csv", UTF_8),
    "both": ("a.csv", b"q,a;b\n1,2\n", "csv", UTF_8),
    "French": ("a.csv", "q,a\noù?,Là-bas à l’été\n".encode("cp1252"), "csv", "cp1252"),
    "a broken letter": ("a.csv", "q,a\nWie groß?,".encode() + b"\xe4\n", "csv", UTF_8),
    "both encodings": (
        "a.csv",
        "question,answer\nUn café?,".encode() + b"\xe9 b \xe9 c \xe0\n",
        "csv",
        UTF_8,
    ),
    "Russian without a foreign letter": (
        "a.csv",
        "q,a\nкак дела,дома и в лесу\n".encode("cp1251"),
        "csv",
        UTF_8,
    ),
    "Chinese": ("a.csv", "question,answer\n你好吗,我很好谢谢你\n".encode("gbk"), "csv", UTF_8),
    "JSON is UTF-8": ("a.jsonl", '{"text": "groß"}\n'.encode("cp1252"), "jsonl", UTF_8),
    "UTF-16, big": ("a.csv", b"\xfe\xff" + "q\ta\nä\tö\n".encode("utf-16-be"), "tsv", "utf-16"),
    "a broken line": ("a.jsonl", b'[INFO] ready\n{"a": 1}\n', "jsonl", UTF_8),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_the_kind_and_the_encoding_of_a_file(case: str, tmp_path: Path) -> None:
    name, content, kind, encoding = WRITTEN[case]
    (tmp_path / name).write_bytes(content)
    [file] = listed(tmp_path / name)
    for found in (scan.scan(file, "").file, scan.head(file).file):
        assert found is not None
        assert (found.kind, found.encoding) == (kind, encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_large_file_in_another_encoding_is_read_by_units(encoding: str, tmp_path: Path) -> None:
    rows = [(f"größer als {n}?", f"„ja“, sagt er; {n} € " * (n % 40)) for n in range(3000)]
    text = "question\tanswer\r\n" + "".join(f"{ask}\t{say}\r\n" for ask, say in rows)
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    [file] = listed(tmp_path / "a.csv")
    found = scan.scan(file, "")
    assert found.file is not None
    assert len(found.units) > 4
    read = [
        row
        for unit in reversed(found.units)
        for _, row in read_unit(found.file, unit, found.columns, ())
    ]
    assert sorted((row["question"], row["answer"]) for row in read) == sorted(rows)
