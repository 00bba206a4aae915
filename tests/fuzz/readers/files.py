"""Files of rows of every kind but parquet, compressed or not."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import zstandard

from olora_ray.config.section import Source
from olora_ray.data.formats.format import Rejected
from olora_ray.data.reader import BOM, read_unit
from olora_ray.data.scan import scan
from olora_ray.data.sources import list_files
from tests.fuzz import mutate
from tests.fuzz.case import Case, agree

SIGNS = [
    "a",
    "b ",
    '"',
    '""',
    ",",
    "\n",
    "\r",
    "\r\n",
    "é",
    "\ufeff",
    "'",
    ";",
    "\t",
    "",
    "\x1a",
    "\u2028",
    '5" pipe',
    "\0",
]


def cases(seed: int, made: Any) -> Iterator[Case]:
    """Whole files, files with other bytes, and compressed ones with other bytes inside or outside."""
    for number in range(10**9):
        random = Random(f"files {seed} {number}")
        kind = ["jsonl", "csv", "json", "txt"][number % 4]
        content = _file(random, kind)
        if random.random() < 0.6:
            content = mutate.raw(random, content)
        pack = random.choice(["", "", "", ".gz", ".zst"])
        if pack:
            content = _packed(random, content, pack)
        yield Case((f"rows.{kind}{pack}", content))


def _file(random: Random, kind: str) -> bytes:
    rows = [
        {"text": _cell(random), "n": mutate.value(random)}
        for _ in range(random.choice([0, 1, 3, 40, 300]))
    ]
    if kind == "jsonl":
        ends = random.choice(["\n", "\n", "\r\n", "\n\n"])
        return "".join(mutate.as_json(row, random) + ends for row in rows).encode()
    if kind == "json":
        columns = {name: [row[name] for row in rows] for name in ("text", "n")}
        return json.dumps(random.choice([rows, columns, mutate.tree(random, rows)])).encode()
    if kind == "csv":
        out = io.StringIO(newline="")
        writer = csv.writer(
            out,
            lineterminator=random.choice(["\n", "\r\n", "\n"]),
            quoting=random.choice([0, 0, 1]),
        )
        writer.writerow(["text", random.choice(["n", "n", "text", ""])])
        for row in rows:
            if random.random() < 0.2:
                out.write(_cell(random) + "," + _cell(random) + "\n")
            else:
                writer.writerow([row["text"], _cell(random)])
        return out.getvalue().encode()
    return "".join(_cell(random) for _ in rows).encode()


def _cell(random: Random) -> str:
    return "".join(random.choices(SIGNS, k=random.choice([0, 1, 2, 5, 9])))


def _packed(random: Random, content: bytes, pack: str) -> bytes:
    compress = gzip.compress if pack == ".gz" else zstandard.ZstdCompressor().compress
    packed = compress(content[: len(content) // 2]) + compress(content[len(content) // 2 :])
    return mutate.raw(random, packed) if random.random() < 0.4 else packed


def read(content: tuple[str, bytes], place: Path, made: Any) -> None:
    """Every row of every unit, compared with what Python's own readers make of the file."""
    name, raw = content
    file = place / name
    file.write_bytes(raw)
    found = list_files(Source(path=str(file), format="text"), "data.train.0", str(place / "runs"))[
        0
    ]
    scanned = scan(found, str(place / "runs"))
    rows = [
        row
        for unit in scanned.units
        for _, row in read_unit(found, unit, scanned.columns, ["text", "n"])
    ]
    expected = _expected(name, raw)
    if expected is not None:
        agree([row for row in rows if not isinstance(row, Rejected)], expected, "rows")


def _expected(name: str, raw: bytes) -> list[Any] | None:
    """What is in an uncompressed file of jsonl or csv, as Python's own readers see it."""
    if name.endswith(".jsonl"):
        return [row for line in raw.removeprefix(BOM).split(b"\n") for row in _line(line)]
    if name.endswith(".csv"):
        try:
            text = raw.removeprefix(BOM).decode("utf-8", "surrogateescape")
            header, *rows = [cells for cells in csv.reader(io.StringIO(text, newline="")) if cells]
        except (csv.Error, ValueError):
            return None
        if len(set(header)) < len(header) or not _is_utf8("".join(header)):
            return None
        whole = [cells for cells in rows if len(cells) == len(header)]
        return [
            dict(zip(header, cells, strict=True)) for cells in whole if _is_utf8("".join(cells))
        ]
    return None


def _line(line: bytes) -> list[Any]:
    try:
        return [json.loads(line.decode())] if line.strip() else []
    except (ValueError, RecursionError):
        return []


def _is_utf8(text: str) -> bool:
    return not any("\udc80" <= sign <= "\udcff" for sign in text)
