"""The data path at a billion rows: 3.9 million units in 10,000 files, 30,518 shards.

Nothing is downloaded or tokenised: the files have one row each, but their scans claim 100,000 rows. The number of
shards is that of a real corpus, with few sequences in each. Every part runs in its own process; its memory is the
growth above the start of that process.

    python benchmarks/scale.py [--rows 1e9] [--files 10000] [--sequences 20000] [--folder ./runs]
"""

import argparse
import json
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

UNIT_ROWS = 256
ROW_BYTES = 1000
PACKS = 16
"""Sequences per shard in this benchmark."""
TOKENS = 512
WRITTEN = {"rows": 10**6, "rejected": 0.01}


@dataclass(frozen=True)
class Measured:
    seconds: float
    mb: float
    found: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=float, default=1e9)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument(
        "--sequences", type=int, default=20_000, help="sequences to read in a later pass"
    )
    parser.add_argument(
        "--folder", default=None, help="folder with room for 1 GB and 100,000 files"
    )
    args = parser.parse_args()
    from common import machine, table

    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        rows = measure(Path(scratch), int(args.rows), args.files, args.sequences)
    print(table(("", "measured", "target", ""), rows))


def measure(folder: Path, rows: int, files: int, sequences: int) -> list[tuple[str, str, str, str]]:
    os.environ["TMPDIR"] = str(folder / "temporary")
    Path(os.environ["TMPDIR"]).mkdir()
    write_files(folder / "corpus", files)
    write_files(
        folder / "few" / "corpus", files
    )  # whose scans are not kept yet: they will say that there are few rows
    first = alone(plan_it, folder, rows, files)
    shards = int(first.found["shards"])
    look = alone(plan_it, folder, rows, files)
    part = alone(unpack_part, folder)
    write_shards(folder / "store", shards)
    late, survey = alone(late_reader, folder, shards), alone(look_at_store, folder, rows, files)
    order, read = alone(order_only, folder, sequences), alone(read_later_pass, folder, sequences)
    rejected = alone(reject, folder, rows, files)
    hashing = alone(hash_shards, folder)
    # Each node hashes a shard of 64 MB with 8,000 sequences once, so this is the additional cost of its first pass.
    hashed = 1.0 / (1.0 / read.found["per_second"] + 64 / hashing.found["mb_per_second"] / 8000)
    return [
        line("driver: plan, memory", first.mb, "MB", 400),
        line("driver: plan, bytes a unit", first.found["bytes_a_unit"], "", 60),
        line("driver: first look but reading, and plan", first.seconds, "s"),
        line("look at an unchanged corpus, and plan", look.seconds, "s", 60),
        line("worker: its part of the plan, memory", part.mb, "MB", 10),
        line("worker: its part of the plan, packed", part.found["kb"], "KB", 100),
        line(
            "later pass: places of sequences", order.found["per_second"], "a second", at_least=1000
        ),
        line(
            "later pass: reading, each shard opened once",
            read.found["per_second"],
            "a second",
            at_least=1000,
        ),
        line(
            "later pass: the same, and each shard of 64 MB hashed",
            hashed,
            "a second",
            at_least=1000,
        ),
        line("later pass: shards opened, a sequence", read.found["opened"], ""),
        line("late reader of a growing store", late.seconds, "s", 60),
        line("preparation begun again: looking at what is there", survey.seconds, "s", 60),
        line("  the same, memory with the plan", survey.mb, "MB", 400),
        line(f"rejected rows, {WRITTEN['rejected']:.0%} of all: memory", rejected.mb, "MB", 100),
    ]


def line(
    what: str, found: float, unit: str, most: float | None = None, at_least: float | None = None
) -> tuple[str, str, str, str]:
    limit = most if most is not None else at_least
    if limit is None:
        return what, f"{found:,.3g} {unit}".strip(), "", ""
    met = found <= limit if most is not None else found >= limit
    sign = "<" if most is not None else ">"
    return what, f"{found:,.4g} {unit}".strip(), f"{sign} {limit:,g}", "met" if met else "MISSED"


def alone(part: Callable[..., dict[str, float]], *arguments: Any) -> Measured:
    """Return the cost of a part in a new process."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_measured, args=(part, arguments, answers))
    process.start()
    found: Measured = answers.get()
    process.join()
    return found


def _measured(part: Callable[..., dict[str, float]], arguments: Any, answers: Any) -> None:
    import olora_ray.tokens.prepare  # noqa: F401 - what is imported is not measured

    Path("/proc/self/clear_refs").write_text("5")
    before, began = resident("VmRSS"), time.perf_counter()
    found = part(*arguments)
    answers.put(Measured(time.perf_counter() - began, (resident("VmHWM") - before) / 1e3, found))


def resident(field: str) -> int:
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(f"{field}:"):
            return int(row.split()[1])
    raise KeyError(field)


def write_files(folder: Path, files: int) -> None:
    """Write files that look unchanged for an hour."""
    folder.mkdir(parents=True)
    at = time.time() - 3600
    for number in range(files):
        path = folder / f"{number:05d}.jsonl"
        path.write_text('{"text": "a"}\n')
        os.utime(path, (at, at))


def made(folder: Path, rows: int, files: int) -> Any:
    from common import decided

    from olora_ray.config.load import build
    from olora_ray.data.tokenizer_spec import TokenizerSpec
    from olora_ray.tokens import prepare

    data = {"train": [{"path": str(folder / "corpus"), "format": "text"}], "max_length": 2048}
    run = {"name": "scale", "storage": str(folder / "runs")}
    config = decided(build({"run": run, "model": {"name": "none"}, "data": data}))
    prepare.scan = partial(made_up, units=max(1, rows // files // UNIT_ROWS))
    return prepare.plan_here(config, TokenizerSpec("{}", "", {}, 0), "train")


def made_up(file: Any, storage_root: str, units: int) -> Any:
    """Return a scan result for a file with so many units."""
    from olora_ray.data import scan
    from olora_ray.data.reader import UNIT, FileScan, Units

    table = np.zeros(units, UNIT)
    table["rows"], table["size"] = UNIT_ROWS, UNIT_ROWS * ROW_BYTES
    table["first"] = np.arange(units) * UNIT_ROWS
    table["offset"] = table["first"] * ROW_BYTES
    result = FileScan(f"{hash(file.uri) % 2**64:064x}", units * UNIT_ROWS, (), Units(table))
    scan.keep_scan(file, storage_root, result)
    return result


def plan_it(folder: Path, rows: int, files: int) -> dict[str, float]:
    plan = made(folder, rows, files)
    pieces = plan.pieces
    held = sum(each.nbytes for each in (pieces.units, pieces.unit, pieces.take))
    (folder / "part.pickle").write_bytes(pickle.dumps(plan.part(len(plan.shards) // 2)))
    return {"shards": len(plan.shards), "bytes_a_unit": held / len(pieces)}


def unpack_part(folder: Path) -> dict[str, float]:
    content = (folder / "part.pickle").read_bytes()
    part = pickle.loads(content)  # written by `plan_it`
    assert len(list(part.pieces)) == len(part.pieces)
    return {"kb": len(content) / 1e3}


def write_shards(folder: Path, shards: int) -> None:
    from olora_ray.common.storage import digest_bytes, seal
    from olora_ray.data.tokenize import Tokens
    from olora_ray.tokens.manifest import shard_name, sidecar_name
    from olora_ray.tokens.shard import Shard, file_bytes

    tokens = Tokens(np.arange(TOKENS, dtype=np.int32), np.ones(TOKENS, dtype=bool))
    shard = Shard(
        [tokens] * PACKS, list(range(PACKS)), [[number] for number in range(PACKS)], PACKS
    )
    content = file_bytes(shard.table())
    sidecar = seal(shard.sidecar(content))
    assert json.loads(sidecar)["sha256"] == digest_bytes(content)
    folder.mkdir()
    at = time.time() - 3600
    for number in range(shards):
        (folder / shard_name(number)).write_bytes(content)
        (folder / sidecar_name(number)).write_text(sidecar)
        os.utime(folder / shard_name(number), (at, at))


def opened(folder: Path) -> Any:
    from olora_ray.tokens.manifest import Outline
    from olora_ray.tokens.store import TokenStore

    shards = sum(1 for _ in (folder / "store").glob("*.arrow"))
    return TokenStore.growing(str(folder / "store"), Outline("0" * 32, shards, TOKENS, ("a",)))


def late_reader(folder: Path, shards: int) -> dict[str, float]:
    assert opened(folder).available_shards == shards
    return {}


def look_at_store(folder: Path, rows: int, files: int) -> dict[str, float]:
    from olora_ray.tokens import prepare

    plan = made(folder, rows, files)
    found = prepare.store_status(
        prepare.StoreSpec(plan, str(folder / "store"), str(folder / "runs"))
    )
    assert not found.missing
    return {}


def order_only(folder: Path, sequences: int) -> dict[str, float]:
    store = opened(folder)
    step, began = 256, time.perf_counter()
    for start in np.linspace(1.1, 1.9, max(1, sequences // step)) * len(store):
        store.order(17, int(start), int(start) + step)
    return {"per_second": sequences / (time.perf_counter() - began)}


def read_later_pass(folder: Path, sequences: int) -> dict[str, float]:
    store = opened(folder)
    began, step = time.perf_counter(), 256
    for start in range(len(store), len(store) + sequences, step):
        for index in store.order(17, start, start + step).tolist():
            assert len(store[index].input_ids) == TOKENS
    seconds = time.perf_counter() - began
    return {"per_second": sequences / seconds, "opened": store._map.cache_info().misses / sequences}


def reject(folder: Path, rows: int, files: int) -> dict[str, float]:
    """Collect the rejected rows of all shards, and write their file; the plan is a small one."""
    from olora_ray.tokens.manifest import RejectedRows

    found = RejectedRows(made(folder / "few", files * UNIT_ROWS, files))
    total = int(rows * WRITTEN["rejected"])
    entry = {
        "source": 0,
        "file": "/data/corpus/00000.jsonl",
        "reason": "too_long",
        "message": "4711 tokens",
    }
    for number, start in enumerate(range(0, total, 400)):
        found.put(number, [{**entry, "line": at} for at in range(start, min(start + 400, total))])
    found.write(str(folder / "rejected.jsonl"))
    return {"bytes": (folder / "rejected.jsonl").stat().st_size}


def hash_shards(folder: Path) -> dict[str, float]:
    from olora_ray.common.storage import digest_file

    path = folder / "shard"
    path.write_bytes(bytes(64 * 10**6))
    began = time.perf_counter()
    digest_file(path)
    return {"mb_per_second": 64 / (time.perf_counter() - began)}


if __name__ == "__main__":
    main()
