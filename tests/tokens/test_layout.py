"""The plan is arrays, and a task gets only the part for its shard."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from olora_ray.data.first_look import read_as
from olora_ray.data.reader import UNIT, Unit, Units
from olora_ray.tokens import plan, shard
from olora_ray.tokens.plan import Plan
from olora_ray.tokens.prepare import plan_here
from tests.tokens import helpers


@pytest.fixture
def made(tmp_path: Path, small_shards: None) -> Plan:
    """Three sources; several turns of one are used, and a part of another."""
    a, b, c = (helpers.write_jsonl(tmp_path / f"{n}.jsonl", helpers.rows(n)) for n in (900, 300, 100))
    weighted = [{"path": str(b), "weight": 2.5}, {"path": str(c), "weight": 0.25}]
    return plan_here(helpers.config(tmp_path / "runs", a, *weighted), helpers.spec(), "train")


def test_the_plan_of_the_same_data_never_changes(made: Plan) -> None:
    # Otherwise a half-built store would be completed with other shards than it was started with.
    pieces = [[[p.file, p.unit.first, p.unit.rows, p.turn, p.share] for p in found] for found in made.shards]
    assert hashlib.sha256(json.dumps(pieces).encode()).hexdigest()[:16] == GOLDEN_PLAN
    assert made.digest() == GOLDEN_STORE


GOLDEN_PLAN = "ac8a26d8003faca2"
GOLDEN_STORE = "9b4d96119fe39d1fd83d5dca7341d861"


def test_a_unit_survives_its_array() -> None:
    largest = Unit(2**62, 2**32 - 1, 2**61, 2**60, 2**32 - 1, 2**32 - 2)
    assert list(Units.of([largest, Unit(0, 1, 2, 3)])) == [largest, Unit(0, 1, 2, 3, 0, 0)]
    assert UNIT.itemsize == 40
    with pytest.raises(OverflowError):
        Units.of([Unit(0, 2**32, 0, 0)])


def test_a_plan_takes_48_bytes_a_unit_and_a_part_of_it_only_its_own(config_of_many: Plan) -> None:
    pieces = config_of_many.pieces
    assert len(pieces) == 200_000
    assert pieces.units.nbytes + pieces.unit.nbytes + pieces.take.nbytes == 48 * len(pieces)
    part = pickle.dumps(config_of_many.part(3))
    assert len(part) < 100 * len(config_of_many.shards[3]) + 3000
    rules = pickle.dumps(config_of_many.rules())
    assert len(rules) < len(pickle.dumps(helpers.spec())) + 2000


@pytest.fixture
def config_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan of 51 million rows; none of its files is read."""
    table = np.zeros(200_000, UNIT)
    table["rows"], table["size"] = 256, 100_000
    table["first"] = np.arange(len(table)) * 256
    path = helpers.write_jsonl(tmp_path / "a.jsonl", helpers.rows(1))
    config = helpers.config(tmp_path / "runs", path)
    scans = plan.FileScan("0" * 64, 256 * len(table), (), Units(table))
    return plan.make_plan(config, helpers.spec(), "train", plan.looking("", lambda found: [[scans]], read_as))


def test_a_task_makes_the_same_shard_of_its_part_alone(made: Plan) -> None:
    rules, parts = pickle.loads(pickle.dumps((made.rules(), [made.part(n) for n in range(len(made.shards))])))
    for number, part in enumerate(parts):
        assert list(part.pieces) == list(made.shards[number])
        assert set(part.files) == {piece.file for piece in made.shards[number]}
        whole = shard.build(made, made.part(number))
        assert shard.file_bytes(shard.build(rules, part).table()) == shard.file_bytes(whole.table())


def test_shards_have_all_pieces_in_order(made: Plan) -> None:
    shards = made.shards
    assert [piece for found in shards for piece in found] == list(made.pieces)
    assert sum(found.bytes for found in shards) == sum(piece.unit.size for found in shards for piece in found)
    assert made.rows == pytest.approx(900 + 750 + 25)
    assert plan.turns(2.5) == [1.0, 1.0, 0.5]
