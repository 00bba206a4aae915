"""Every function of the storage module on a real S3 server, and what a server that misbehaves leads to."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from olora_ray.common import node_cache, retry, s3, storage
from olora_ray.common.errors import StoreError, TryAgain, UserError
from tests.gs_server import BUCKET, gs_server
from tests.refused import refused
from tests.s3_server import Faults, Server, within
from tests.said import said


@pytest.fixture
def server(s3_server: Server) -> Server:
    return s3_server


@pytest.fixture
def place(bucket: str) -> str:
    return bucket


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short times: what they are is not tested."""
    for module in (retry, s3):
        monkeypatch.setattr(module, "ANSWER_SECONDS", 1)
    retry._connected.cache_clear()
    s3._cached_client.cache_clear()
    monkeypatch.setattr(retry, "PATIENCE", 5.0)


class TestFiles:
    @pytest.fixture(params=["s3", "gs"])
    def place(
        self, request: pytest.FixtureRequest, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[str]:
        if request.param == "s3":
            yield bucket
            return
        with gs_server(monkeypatch):
            yield f"gs://{BUCKET}/runs"

    def test_a_file_is_written_read_and_removed(self, place: str) -> None:
        file = storage.join(place, "deep", "down", "a.txt")
        assert not storage.exists(file)
        storage.write_text(file, "grüße")
        assert storage.exists(file)
        assert storage.exists(storage.join(place, "deep"))
        assert storage.read_text(file) == "grüße"
        storage.write_bytes(file, b"other")
        assert storage.read_bytes(file) == b"other"
        storage.remove(file)
        assert not storage.exists(file)
        storage.remove(file)
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(file)

    def test_names_are_those_of_files_and_folders(self, place: str) -> None:
        assert storage.names(place) == []
        for name in ("b", "a/x", "a/y", "c/d/e"):
            storage.write_text(storage.join(place, name), "x" * len(name))
        assert storage.names(place) == ["a", "b", "c"]
        assert storage.files_below(place) == {"b": 1, "a/x": 3, "a/y": 3, "c/d/e": 5}
        storage.remove(storage.join(place, "a"))
        assert storage.names(place) == ["b", "c"]


class TestRequests:
    @pytest.mark.parametrize(
        "name", ["50%.json", "a%20b.json", "#1 of 2.json", "a+b=c&d.json", "grüße.json"]
    )
    def test_a_key_is_taken_as_it_is_written(
        self, server: Server, place: str, name: str, tmp_path: Path
    ) -> None:
        storage.write_text(storage.join(place, name), "x")
        assert server.keys(place) == [name]
        assert storage.read_text(storage.join(place, name)) == "x"
        assert node_cache.local_copy(storage.join(place, name), tmp_path).read_text() == "x"

    def test_nothing_is_below_an_address_with_a_query(self) -> None:
        with pytest.raises(
            UserError, match=r"s3://b/p: write it without '\?region=x'; .*AWS_ENDPOINT_URL"
        ):
            storage.join("s3://b/p?region=x", "a")


class TestCheck:
    def test_a_store_that_reads_parts_of_files_wrongly(self, server: Server, place: str) -> None:
        """As an RGW on dbstore does: shards and weights, which are read in parts, would be others."""
        server.faults = Faults(wrong_ranges=True)
        with pytest.raises(UserError):
            storage.check_storage(place, "run.storage")

    def test_wrong_credentials(self, server: Server, place: str) -> None:
        """A server that checks them, as all but moto do by themselves."""
        import requests

        requests.post(f"{server.url}/moto-api/reset-auth", data=b"0", timeout=10)
        try:
            with refused("refuses access (InvalidAccessKeyId); check the credentials") as caught:
                storage.check_storage(place, "run.storage")
        finally:
            requests.post(f"{server.url}/moto-api/reset-auth", data=b"Infinity", timeout=10)
        assert not isinstance(caught.value, TryAgain)
        assert "\n" not in str(caught.value)

    def test_no_credentials(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with refused("Unable to locate credentials; set AWS_ACCESS_KEY_ID and"):
            storage.check_storage(place, "run.storage")

    @pytest.mark.parametrize("fault", ["hang", "refuse"])
    def test_a_server_that_hangs_or_has_no_time(
        self, server: Server, place: str, hurried: None, fault: str
    ) -> None:
        server.faults = Faults(hang=fault == "hang", refuse=-1 if fault == "refuse" else None)
        says = "Read timeout" if fault == "hang" else r"SlowDown \(HTTP 503\)"
        with pytest.raises(TryAgain, match=f"does not answer: {says}"), within(15):
            storage.check_storage(place, "run.storage")

    def test_a_full_store_does_not_pass_by_itself(self, server: Server, place: str) -> None:
        server.faults = Faults(full=True)
        with pytest.raises(
            UserError, match=r"cannot be written: .*XMinioStorageFull.*make room"
        ) as caught:
            storage.check_storage(place, "run.storage")
        assert caught.value.exit_code == 2
        with pytest.raises(StoreError) as written:
            storage.write_text(storage.join(place, "a"), "x")
        assert written.value.exit_code == 2

    def test_without_boto3_the_command_that_installs_it_is_told(
        self, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "boto3", None)
        with pytest.raises(
            UserError,
            match=r"run\.storage: s3://.* needs .* boto3.*: pip install 'olora-ray\[s3\]'",
        ):
            storage.check_storage(place, "run.storage")


@pytest.mark.usefixtures("hurried")
class TestPatience:
    def test_a_store_that_has_answered_is_asked_again(self, server: Server, place: str) -> None:
        storage.write_text(storage.join(place, "a"), "x")
        server.faults = Faults(refuse=2 * retry.ATTEMPTS)
        with said() as lines:
            assert storage.read_text(storage.join(place, "a")) == "x"
        assert len(lines) == 2
        assert lines[0].startswith(f"warning: {place.removesuffix('/runs')} does not answer (")
        assert lines[0].endswith("; retrying for 5 s more")

    def test_one_that_never_has_is_not(self, server: Server, place: str) -> None:
        server.faults = Faults(refuse=-1)
        with said() as lines, pytest.raises(OSError):
            storage.exists(storage.join(place, "a"))
        assert lines == []

    def test_patience_has_an_end(self, server: Server, place: str) -> None:
        storage.names(place)
        server.faults = Faults(refuse=-1)
        with said() as lines, pytest.raises(OSError, match="503"), within(60):
            storage.exists(storage.join(place, "a"))
        assert lines

    def test_what_does_not_pass_is_told_at_once(self, place: str) -> None:
        storage.names(place)
        missing = "s3://none/a"
        with pytest.raises(FileNotFoundError):
            storage.read_text(missing)
        with said() as lines, pytest.raises(OSError):
            storage.write_text(missing, "x")
        assert lines == []


class TestConditions:
    def test_the_first_of_two_writes_and_the_owner_writes_again(self, place: str) -> None:
        key = storage.join(place, "lock")
        first = s3.put_if(key, b"first", None)
        assert first is not None
        assert s3.put_if(key, b"second", None) is None
        again = s3.put_if(key, b"again", first)
        assert again is not None
        assert s3.put_if(key, b"late", first) is None
        assert s3.get(key) == (b"again", again)
        storage.remove(key)
        assert s3.get(key) is None
        assert s3.put_if(key, b"late", again) is None
