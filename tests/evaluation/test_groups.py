"""Groups of held-out rows are read again from the files, for every file type and under the source's field names."""

import csv
import json
from pathlib import Path

import pytest

from olora_ray.config.load import build
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.evaluation.groups import FILE, group_names, origins
from olora_ray.evaluation.rows import numbered
from olora_ray.tokens import prepare
from olora_ray.tokens.plan import Plan
from tests import tiny
from tests.said import said

SPEC = TokenizerSpec("{}", "", {}, 0)
CUSTOMERS = ["ann", "bob", "ann", None, "bob", None]


def plan(folder: Path, **source: object) -> Plan:
    held_out = {"path": str(folder / "held"), "format": "prompt_completion", **source}
    tree = {
        "run": {"name": "n", "storage": str(folder / "runs")},
        "model": {"name": "m"},
        "data": {"train": [held_out], "eval": [held_out]},
    }
    return prepare.plan_here(build(tree), SPEC, "eval")


@pytest.fixture(params=["jsonl", "csv", "json", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of six rows with a column `customer`, and one more file."""
    rows = [{"ask": str(n), "customer": name, "answer": "x\ny"} for n, name in enumerate(CUSTOMERS)]
    (tmp_path / "held").mkdir()
    file = tmp_path / "held" / f"a.{request.param}"
    if request.param == "jsonl":
        file.write_text("\n\n".join(map(json.dumps, rows)))
    elif request.param == "csv":
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif request.param == "json":
        file.write_text(json.dumps(rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    (tmp_path / "held" / "b.jsonl").write_text(
        json.dumps({"ask": "7", "customer": "ann", "answer": "z"})
    )
    return tmp_path


def places(found: Plan) -> list[tuple[int, int]]:
    """Return the origin of each row, as a token store has it."""
    from olora_ray.data.reader import read_unit

    return [
        (piece.file, place)
        for shard in found.shards
        for piece in shard
        for place, _ in read_unit(
            found.files[piece.file].file, piece.unit, found.files[piece.file].columns, ["ask"]
        )
    ]


@pytest.mark.parametrize("fields", [{}, {"prompt": "customer"}])
def test_rows_with_the_same_value_are_a_group_and_rows_without_are_alone(
    folder: Path, fields: dict[str, str]
) -> None:
    found = plan(folder, fields=fields)
    with said() as lines:
        groups = numbered(group_names("prompt" if fields else "customer", found, places(found)))
    assert groups == [0, 1, 0, 2, 1, 3, 0]
    assert "gate.group: 2 held-out rows without" in "".join(lines)


def test_rows_of_a_file_are_a_group(folder: Path) -> None:
    found = plan(folder)
    assert numbered(group_names(FILE, found, places(found))) == [0] * 6 + [1]


def test_origins_of_a_store_are_in_the_order_of_its_examples() -> None:
    store = tiny.ListStore([tiny.pack(5, 6), tiny.pack(7)])
    store.files = ("other.jsonl", "rows.jsonl")
    assert origins(store) == ((1, -1), (1, 0), (1, 9))
