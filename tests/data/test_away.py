"""Files of rows on an object store that fails while they are listed and read."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs, parquet

from olora_ray.common import retry
from olora_ray.common.errors import StoreUnavailable, TryAgain
from olora_ray.data import scan
from olora_ray.data.reader import read_unit
from tests.data.reading import listed, texts
from tests.said import said

AWAY = "When reading information for key 'a' in bucket 'b': AWS Error NETWORK_CONNECTION during HeadObject operation"
TEXTS = [f"row {number:04d}" for number in range(1000)]


class Store:
    """A local folder as an object store; each of its reads and listings may fail."""

    type_name = "s3"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Returns whether a request fails, by its number.
        self.fails: Callable[[int], bool] = lambda number: False
        self.requests = 0

    def request(self) -> None:
        self.requests += 1
        if self.fails(self.requests):
            raise OSError(AWAY)

    def get_file_info(self, wanted: Any) -> Any:
        self.request()
        return fs.LocalFileSystem().get_file_info(wanted)

    def open_input_file(self, path: str) -> "_Object":
        return _Object(path, self)

    def open_input_stream(self, path: str, compression: None = None) -> "_Object":
        return _Object(path, self)


class _Object(io.FileIO):
    def __init__(self, path: str, store: Store) -> None:
        super().__init__(path)
        self.store = store

    def read(self, size: int | None = -1) -> bytes:
        self.store.request()
        return super().read(size) or b""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store(tmp_path)
    monkeypatch.setattr(retry, "connect", lambda scheme, bucket, query="": (found, str(tmp_path)))
    monkeypatch.setattr(retry, "_answered", {"s3://bucket"})
    monkeypatch.setattr(retry, "PATIENCE", 1.0)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=400)
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "*.parquet"])
def test_it_is_asked_again(name: str, store: Store) -> None:
    # Without retries, a moment's failure of the network, in a night of reading, ended the run.
    assert texts(listed(f"s3://bucket/{name}")) == TEXTS
    requests, store.requests = store.requests, 0
    failed = set[int]()

    def once_at_each(number: int) -> bool:
        """Every request fails, and its repetition does not."""
        again = number - 1 in failed
        failed.update([] if again else [number])
        return not again and number in {1, requests // 2, requests}

    store.fails = once_at_each
    with said() as lines:
        assert texts(listed(f"s3://bucket/{name}")) == TEXTS
    assert f"warning: s3://bucket does not answer ({AWAY}); retrying for 1 s more" in lines


def test_one_that_stays_away_ends_the_command_for_now(store: Store) -> None:
    # Exit code 75 lets the caller start the same command again; it was 2, with the message "not readable".
    [file] = listed("s3://bucket/a.jsonl")
    unit = scan.scan(file, "").units[0]
    store.fails = lambda number: True
    for ask in (lambda: scan.head(file), lambda: list(read_unit(file, unit, (), ["text"]))):
        with pytest.raises(StoreUnavailable, match=rf"^s3://bucket/a\.jsonl: {AWAY}$"):
            ask()
    with pytest.raises(
        TryAgain, match=r"^data\.train\.0\.path: s3://bucket/a\.jsonl: .*NETWORK_CONNECTION"
    ):
        listed("s3://bucket/a.jsonl")
