"""Copies of files and folders from and to a real S3 server."""

from pathlib import Path

import pytest

from olora_ray.common import node_cache, s3, storage
from tests.s3_server import Server


def test_a_file_is_fetched_once(s3_server: Server, bucket: str, tmp_path: Path) -> None:
    storage.write_text(storage.join(bucket, "a.txt"), "x")
    for _ in range(2):
        found = node_cache.local_copy(storage.join(bucket, "a.txt"), tmp_path / "deep" / "cache")
        assert (found.name, found.read_text()) == ("a.txt", "x")
    with s3_server.counted() as requests:
        node_cache.local_copy(storage.join(bucket, "a.txt"), tmp_path / "deep" / "cache")
    assert requests == []


def test_a_key_does_not_lead_out_of_the_folder(
    s3_server: Server, bucket: str, tmp_path: Path
) -> None:
    name, key = s3.split(bucket)
    s3_server.client().put_object(Bucket=name, Key=f"{key}/model/../../evil", Body=b"x")
    with pytest.raises(OSError):
        node_cache.local_copy(storage.join(bucket, "model"), tmp_path / "cache")
    assert [
        path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"
    ] == []


def test_a_copy_for_a_while_leaves_nothing(bucket: str, temporary: Path) -> None:
    storage.write_text(storage.join(bucket, "model", "a"), "x")
    with node_cache.fetched(storage.join(bucket, "model")) as folder:
        assert folder.name == "model"
        assert (folder / "a").read_text() == "x"
    with pytest.raises(FileNotFoundError), node_cache.fetched(storage.join(bucket, "none")):
        pass
    assert list(temporary.iterdir()) == []


def test_a_folder_is_uploaded_the_named_file_last(
    s3_server: Server, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "b", "deep/c", "z"):
        (tmp_path / name).write_text(name)
    with s3_server.counted() as requests:
        node_cache.upload(tmp_path, storage.join(bucket, "up"), last="a")
    assert [method for method, _ in requests] == ["PUT"] * 4
    assert requests[-1][1].endswith("/up/a")
    assert sorted(s3_server.keys(storage.join(bucket, "up"))) == ["a", "b", "deep/c", "z"]
    assert storage.read_text(storage.join(bucket, "up", "deep", "c")) == "deep/c"


def test_what_an_earlier_attempt_left_does_not_stay_beside_it(
    bucket: str, s3_server: Server, temporary: Path
) -> None:
    """An export that was made anew with other settings had both kinds of files of weights."""
    place = storage.join(bucket, "again")
    for name in ("a", "deep/old"):
        storage.write_text(storage.join(place, name), "old")
    with node_cache.local_folder(place) as folder:
        (folder / "deep").mkdir(parents=True)
        for name in ("a", "deep/new"):
            (folder / name).write_text("new")
    assert sorted(s3_server.keys(place)) == ["a", "deep/new"]
    assert storage.read_text(storage.join(place, "a")) == "new"
    assert list(temporary.iterdir()) == []
