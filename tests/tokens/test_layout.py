"""The plan is arrays, and a task gets only the part for its shard."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest

from olora_ray.tokens import shard
from olora_ray.tokens.plan import Plan
from olora_ray.tokens.prepare import plan_here
from tests.tokens import helpers


@pytest.fixture
def made(tmp_path: Path, small_shards: None) -> Plan:
    """Three sources; several turns of one are used, and a part of another."""
    a, b, c = (
        helpers.write_jsonl(tmp_path / f"{n}.jsonl", helpers.rows(n)) for n in (900, 300, 100)
    )
    weighted = [{"path": str(b), "weight": 2.5}, {"path": str(c), "weight": 0.25}]
    return plan_here(helpers.config(tmp_path / "runs", a, *weighted), helpers.spec(), "train")


def test_the_plan_of_the_same_data_never_changes(made: Plan) -> None:
    # Otherwise a half-built store would be completed with other shards than it was started with.
    pieces = [
        [[p.file, p.unit.first, p.unit.rows, p.turn, p.share] for p in found]
        for found in made.shards
    ]
    assert hashlib.sha256(json.dumps(pieces).encode()).hexdigest()[:16] == GOLDEN_PLAN
    assert made.digest() == GOLDEN_STORE


GOLDEN_PLAN = "ac8a26d8003faca2"
GOLDEN_STORE = "9b4d96119fe39d1fd83d5dca7341d861"


def test_a_task_makes_the_same_shard_of_its_part_alone(made: Plan) -> None:
    rules, parts = pickle.loads(
        pickle.dumps((made.rules(), [made.part(n) for n in range(len(made.shards))]))
    )
    for number, part in enumerate(parts):
        assert list(part.pieces) == list(made.shards[number])
        assert set(part.files) == {piece.file for piece in made.shards[number]}
        whole = shard.build(made, made.part(number))
        assert shard.file_bytes(shard.build(rules, part).table()) == shard.file_bytes(whole.table())
