"""Parquet files."""

import io
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from olora_ray.config.section import Source
from olora_ray.data.reader import read_unit
from olora_ray.data.scan import scan
from olora_ray.data.sources import list_files
from tests.fuzz import mutate


def cases(seed: int, made: Any) -> Iterator[bytes]:
    """Files with other bytes, mostly in the footer."""
    for number in range(10**9):
        random = Random(f"parquet {seed} {number}")
        rows = [
            {"text": f"row {i}" * (i % 5), "n": i, "inner": {"x": [i] * (i % 3)}}
            for i in range(random.choice([0, 1, 30, 700]))
        ]
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        out = io.BytesIO()
        parquet.write_table(
            table,
            out,
            row_group_size=random.choice([1, 10, 1000]),
            compression=random.choice(["none", "snappy", "zstd"]),
        )
        content = out.getvalue()
        footer = content[-random.choice([12, 100, 1000, len(content)]) :]
        yield content[: -len(footer)] + mutate.raw(random, footer)


_SCHEMA = pa.schema(
    {"text": pa.string(), "n": pa.int64(), "inner": pa.struct({"x": pa.list_(pa.int64())})}
)


def read(content: bytes, place: Path, made: Any) -> None:
    """Every row of every unit."""
    file = place / "rows.parquet"
    file.write_bytes(content)
    found = list_files(Source(path=str(file), format="text"), "data.train.0", str(place / "runs"))[
        0
    ]
    scanned = scan(found, str(place / "runs"))
    columns = ["text", "n", "inner"]
    for unit in scanned.units:
        list(read_unit(found, unit, scanned.columns, columns))
