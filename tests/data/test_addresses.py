"""Names of files with characters that have a meaning in a URI."""

from pathlib import Path

import pytest

from olora_ray.config.section import Source
from olora_ray.data import scan, sources
from olora_ray.data.reader import read_unit

NAMES = [
    "plain.jsonl",
    "a b.jsonl",
    "a#b.jsonl",
    "a%23b.jsonl",
    "a%20b.jsonl",
    "a+b&c=d.jsonl",
    "süß.jsonl",
]


def texts(place: str, only: tuple[str, ...] = ()) -> list[str]:
    found = []
    for file in sources.list_files(
        Source(path=place, format="text", only=only), "data.train.0", ""
    ):
        units = scan.scan(file, "").units
        found += [row["text"] for unit in units for _, row in read_unit(file, unit, (), ["text"])]
    return found


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_with_odd_names(scheme: str, tmp_path: Path) -> None:
    for name in [*NAMES, "a?b.jsonl"]:
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    assert sorted(texts(f"{scheme}{tmp_path}")) == sorted([*NAMES, "a?b.jsonl"])
    [one] = [
        file
        for file in sources.list_files(Source(path=f"{scheme}{tmp_path}"), "x", "")
        if "23b" in file.uri
    ]
    assert texts(f"{scheme}{tmp_path}", (one.uri,)) == ["a%23b.jsonl"]
    assert texts(one.uri) == ["a%23b.jsonl"]


def test_percent_signs_in_a_file_uri_are_those_of_uris(tmp_path: Path) -> None:
    (tmp_path / "some folder").mkdir()
    (tmp_path / "some folder" / "a.jsonl").write_text('{"text": "x"}\n')
    for path in ("some%20folder", "some folder", "some%20folder/a.jsonl", "some%20folder/*.jsonl"):
        assert texts(f"file://{tmp_path}/{path}") == ["x"]
