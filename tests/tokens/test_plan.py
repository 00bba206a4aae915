"""Weights, mixing and the draw of held-out rows."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olora_ray.config.schema import Config
from olora_ray.data.detect import read_as
from olora_ray.data.reader import FileScan
from olora_ray.data.scan import scan
from olora_ray.data.sources import File
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens import plan
from olora_ray.tokens.prepare import begin, look_here, plan_here, prepare
from olora_ray.tokens.store import TokenStore
from tests.tokens import helpers


def corpus(path: Path, letter: str, rows: int) -> Path:
    return helpers.write_jsonl(path, [{"text": f"{letter}{n}"} for n in range(rows)])


def text(path: Path, weight: float = 1.0) -> dict[str, Any]:
    return {"path": str(path), "format": "text", "weight": weight}


def rows(config: Config, spec: TokenizerSpec, split: Any = "train") -> list[str]:
    return [
        row.removeprefix("<s>").removesuffix("</s>")
        for row in helpers.texts(prepare(config, spec, split))
    ]


def scanned(found: Sequence[Sequence[File]]) -> list[list[FileScan]]:
    return [[scan(file, "") for file in files] for files in found]


def test_a_file_that_grows_between_the_splits_is_split_once(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    # Held-out rows depend on the file's content: with two states of the file, most would be in both splits.
    path = corpus(tmp_path / "a.jsonl", "a", 400)
    config, seen = helpers.config(tmp_path / "runs", text(path), eval_fraction=0.2), []
    look = look_here(config)
    train = begin(config, tiny_spec, "train", look)
    corpus(path, "a", 500)
    build = begin(config, tiny_spec, "eval", look)
    train.check_against(build)
    for each in (build, train):
        each.run()
        seen.append(set(helpers.texts(TokenStore.open(each.store.uri))))
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 400
    digests = [
        plan_here(config, tiny_spec, "train", look).digest(),
        plan_here(config, tiny_spec, "train").digest(),
    ]
    assert digests[0] == digests[1] != build.store.digest, "the next run looks again"


def test_sources_are_mixed_evenly(tmp_path: Path, tiny_spec: TokenizerSpec) -> None:
    a, b = corpus(tmp_path / "a.jsonl", "a", 40_000), corpus(tmp_path / "b.jsonl", "b", 2_000)
    config = helpers.config(tmp_path / "runs", text(a), text(b))
    made = plan.make_plan(config, tiny_spec, "train", plan.looking("", scanned, read_as))
    assert len(made.shards) == round(42_000 / 4096)
    shares = []
    for pieces in made.shards:
        sizes = Counter[int]()
        for piece in pieces:
            sizes[made.files[piece.file].source] += piece.unit.rows
        assert 3500 < sum(sizes.values()) < 4700
        shares.append(sizes[1] / sum(sizes.values()))
    assert np.allclose(shares, 2 / 42, atol=0.02)


def test_training_is_shuffled_and_evaluation_is_not(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    a = corpus(tmp_path / "a.jsonl", "a", 2000)
    config = helpers.config(tmp_path / "runs", text(a), eval=[text(a)], packing=False)
    found = [int(row[1:]) for row in rows(config, tiny_spec)]
    assert sorted(found) == list(range(2000))
    assert abs(np.corrcoef(found, range(2000))[0, 1]) < 0.1
    assert rows(config, tiny_spec, "eval") == [f"a{n}" for n in range(2000)]
    other = helpers.config(tmp_path / "runs", text(a), packing=False, seed=18)
    assert [int(row[1:]) for row in rows(other, tiny_spec)] != found


def test_held_out_rows_are_drawn_from_seed_and_content_alone(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    a = corpus(tmp_path / "a.jsonl", "a", 3000)
    config = helpers.config(tmp_path / "runs", text(a), eval_fraction=0.1)
    train, held_out = rows(config, tiny_spec), rows(config, tiny_spec, "eval")
    assert sorted(train + held_out) == sorted(f"a{n}" for n in range(3000))
    assert 240 < len(held_out) < 360
    moved = corpus(tmp_path / "other/place.jsonl", "a", 3000)
    extra = corpus(tmp_path / "b.jsonl", "b", 100)
    again = helpers.config(tmp_path / "runs2", text(extra), text(moved, 2.0), eval_fraction=0.1)
    kept = Counter(row for row in rows(again, tiny_spec) if row.startswith("a"))
    assert set(kept) == set(train)
    assert set(kept.values()) == {2}
    assert {row for row in rows(again, tiny_spec, "eval") if row.startswith("a")} == set(held_out)
    reseeded = helpers.config(tmp_path / "runs", text(a), eval_fraction=0.1, seed=1)
    assert set(rows(reseeded, tiny_spec, "eval")) != set(held_out)


def test_each_of_several_sources_has_a_held_out_row(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    mails = tmp_path / "mails.csv"
    with mails.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([f"m{n}\n\nand\nmore"] for n in range(30))])
    few = corpus(tmp_path / "few.jsonl", "f", 9)
    sources = [text(corpus(tmp_path / "a.jsonl", "a", 3000)), text(mails), text(few)]

    def config(*sources: Any) -> Config:
        return helpers.config(tmp_path / "runs", *sources, eval_fraction=0.004)

    train, held_out = (rows(config(*sources), tiny_spec, split) for split in ("train", "eval"))
    assert Counter(row[0] for row in held_out) == {"a": 15, "m": 1}
    assert Counter(row[0] for row in train) == {"a": 2985, "m": 29, "f": 9}
    both = config(sources[0], text(corpus(tmp_path / "b.jsonl", "b", 3000)))
    assert "shares" not in plan_here(both, tiny_spec, "eval").inputs(), "existing stores stay"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 18},
        {"max_length": 127},
        {"packing": False},
        {"last_turn_only": True},
        {"eval_fraction": 0.2},
        {"train": "weight"},
        {"train": "content"},
        {"train": "fields"},
        {"spec": "template"},
    ],
)
def test_the_digest_covers_what_matters(
    change: dict[str, Any], tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    a, b = corpus(tmp_path / "a.jsonl", "a", 30), corpus(tmp_path / "b.jsonl", "b", 30)

    def digest(source: dict[str, Any], spec: TokenizerSpec, **data: Any) -> str:
        config = helpers.config(tmp_path / "runs", source, **data)
        return plan.make_plan(config, spec, "train", plan.looking("", scanned, read_as)).digest()

    base = digest(text(a), tiny_spec)
    elsewhere = corpus(tmp_path / "elsewhere/z.jsonl", "a", 30)
    assert digest(text(elsewhere), tiny_spec) == base, "where things are is no matter"
    sources = {
        "weight": text(a, 2.0),
        "content": text(b),
        "fields": {**text(a), "fields": {"text": "body"}},
    }
    source = sources.get(change.pop("train", ""), text(a))
    spec = helpers.spec("{{ messages }}") if change.pop("spec", None) else tiny_spec
    assert digest(source, spec, **change) != base
