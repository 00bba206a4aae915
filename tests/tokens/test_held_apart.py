"""Held-out rows among the training rows are detected by their tokens, and refused if there are many."""

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.prepare import begin, prepare
from tests.said import said
from tests.tokens import helpers


def prepared(config: Config, spec: TokenizerSpec) -> str:
    """Return the warning or error about held-out rows that are training rows too."""
    held_out = begin(config, spec, "eval")
    held_out.run()
    build = begin(config, spec, "train")
    build.check_against(held_out)
    with said() as lines, contextlib.suppress(UserError):
        build.run()
        return " ".join(line for line in lines if "training rows too" in line)
    with pytest.raises(UserError) as caught:
        build.run()
    return str(caught.value)


def config_of(folder: Path, train: Sequence[Any], held_out: Sequence[Any]) -> Config:
    train_path = helpers.write_jsonl(folder / "train.jsonl", train)
    eval_path = helpers.write_jsonl(folder / "eval.jsonl", held_out)
    return helpers.config(folder / "runs", train_path, eval=[str(eval_path)])


def unlike(first: int, count: int) -> list[Any]:
    return [helpers.chat(f"q{number}", "a") for number in range(first, first + count)]


def whole(config: Config, spec: TokenizerSpec) -> None:
    prepare(config, spec, "train")


def half(config: Config, spec: TokenizerSpec) -> None:
    folder = Path(prepare(config, spec, "train").uri)
    (folder / "shard-00000.arrow").unlink()
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    "before", [lambda config, spec: None, half, whole], ids=["nothing", "half", "whole"]
)
@pytest.mark.parametrize(
    ("shared", "held_out", "told"),
    [
        (20, 200, r"data\.eval: ([3-9]|1\d) or more of 200|data\.eval: 20 or more"),
        (3, 200, r"data\.eval: 3 or more of 200"),
        (1, 200, r"warning: data\.eval: 1 of 200"),
        (0, 9, ""),
        (1, 9, r"data\.eval: 1 or more of 9"),
    ],
)
def test_rows_of_the_training_data_among_those_held_out(
    shared: int,
    held_out: int,
    told: str,
    before: Callable[[Config, TokenizerSpec], None],
    tmp_path: Path,
    tiny_spec: TokenizerSpec,
    small_shards: None,
) -> None:
    # Rows are compared by their tokens, so other columns do not matter.
    rows = [{**row, "id": number} for number, row in enumerate(unlike(180, 200))]
    config = config_of(tmp_path, [*unlike(0, 180), *rows], unlike(380 - shared, held_out))
    before(config, tiny_spec)
    found = prepared(config, tiny_spec)
    assert bool(found) == bool(told)
    assert re.match(told, found)
    if found.startswith("warning"):
        assert prepared(config, tiny_spec) == found  # the next start says it again


def test_copies_of_rows_that_a_fraction_holds_out_are_left_out_of_the_training(
    tmp_path: Path, tiny_spec: TokenizerSpec, small_shards: None
) -> None:
    rows = unlike(0, 300)
    copied = [{**row, "id": number} for number, row in enumerate(rows[:60])]
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [*rows, *copied, *copied])
    config = helpers.config(tmp_path / "runs", path, eval_fraction=0.2)
    with said() as lines:
        train, held_out = (prepare(config, tiny_spec, split) for split in ("train", "eval"))
    assert train.shard_count > 3
    assert not set(helpers.texts(train)) & set(helpers.texts(held_out))
    assert len({*helpers.texts(train), *helpers.texts(held_out)}) == len(rows)
    left_out = train.manifest.notes["copies"]
    assert 0 < left_out == train.manifest.rows - train.manifest.examples
    assert [line for line in lines if "copies" in line] == [
        f"tokens: train: copies of held-out rows, left out of the training: {left_out}"
    ]
    # Any shard is built again with the same bytes, alone and in any order.
    folder = Path(train.uri)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for number in (2, 0):
        (folder / f"shard-0000{number}.arrow").unlink()
        prepare(config, tiny_spec, "train")
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_rows_that_are_mostly_copies_are_refused(tmp_path: Path, tiny_spec: TokenizerSpec) -> None:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", unlike(0, 5) * 40)
    told = prepared(helpers.config(tmp_path / "runs", path, eval_fraction=0.2), tiny_spec)
    assert re.match(
        r"data\.train: \d+ of \d+ training rows are copies of held-out rows; keep each row once",
        told,
    )
