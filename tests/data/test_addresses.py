"""Names of files with characters that have a meaning in a URI."""

from pathlib import Path

import pytest

from tests.data.reading import listed, texts

NAMES = [
    "plain.jsonl",
    "a b.jsonl",
    "a#b.jsonl",
    "a%23b.jsonl",
    "a%20b.jsonl",
    "a+b&c=d.jsonl",
    "süß.jsonl",
]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_with_odd_names(scheme: str, tmp_path: Path) -> None:
    for name in [*NAMES, "a?b.jsonl"]:
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    assert sorted(texts(listed(f"{scheme}{tmp_path}"))) == sorted([*NAMES, "a?b.jsonl"])
    [one] = [file for file in listed(f"{scheme}{tmp_path}") if "23b" in file.uri]
    assert texts(listed(f"{scheme}{tmp_path}", only=(one.uri,))) == ["a%23b.jsonl"]
    assert texts(listed(one.uri)) == ["a%23b.jsonl"]


def test_percent_signs_in_a_file_uri_are_those_of_uris(tmp_path: Path) -> None:
    (tmp_path / "some folder").mkdir()
    (tmp_path / "some folder" / "a.jsonl").write_text('{"text": "x"}\n')
    for path in ("some%20folder", "some folder", "some%20folder/a.jsonl", "some%20folder/*.jsonl"):
        assert texts(listed(f"file://{tmp_path}/{path}")) == ["x"]
