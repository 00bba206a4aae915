"""A dry run reports about the data what the preparation does with it."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens import preview as previews
from olora_ray.tokens.prepare import prepare
from olora_ray.tokens.preview import describe
from tests.tokens import helpers
from tests.tokens.helpers import chat, rows

NUMBERS = ("rows", "packs", "tokens", "supervised", "rejected")


def test_a_small_corpus_is_described_exactly(corpus: Config, tiny_spec: TokenizerSpec) -> None:
    preview = describe(corpus, tiny_spec)
    manifest = prepare(corpus, tiny_spec, "train").manifest
    assert len(manifest.shards) > 1
    assert preview.exact
    assert [getattr(preview, name) for name in NUMBERS] == [
        getattr(manifest, name) for name in NUMBERS
    ]
    assert round(preview.fill, 4) == manifest.fill
    assert [(each.setting, each.rows, each.rejected) for each in preview.sources] == [
        ("data.train.0", 501, 1),
        ("data.train.1", 240, 0),  # its weight is 2
    ]


def test_held_out_rows_are_described_as_they_are_prepared(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", rows(200))
    for data in ({"eval": [{"path": str(path)}]}, {"eval_fraction": 0.2}):
        config = helpers.config(tmp_path / "runs", path, **data)
        for split in ("train", "eval"):
            preview, manifest = (
                describe(config, tiny_spec, split),
                prepare(config, tiny_spec, split).manifest,
            )
            assert [getattr(preview, name) for name in NUMBERS] == [
                getattr(manifest, name) for name in NUMBERS
            ]


@pytest.mark.usefixtures("small_shards")
def test_held_out_rows_may_begin_in_a_later_shard(tmp_path: Path, tiny_spec: TokenizerSpec) -> None:
    # If few of many rows are held out, the dry run ended with a traceback.
    path = helpers.write_jsonl(tmp_path / "a.jsonl", rows(400))
    config = helpers.config(tmp_path / "runs", path, eval_fraction=0.01)
    manifest = prepare(config, tiny_spec, "eval").manifest
    assert manifest.packs
    assert not manifest.shards[0].packs
    preview = describe(config, tiny_spec, "eval")
    assert [getattr(preview, name) for name in NUMBERS] == [
        getattr(manifest, name) for name in NUMBERS
    ]
    assert preview.examples
    assert preview.some_packs


def test_the_examples_are_of_two_sources_with_what_is_supervised(
    corpus: Config, tiny_spec: TokenizerSpec
) -> None:
    first, second = describe(corpus, tiny_spec).examples
    assert first.origin.rpartition("/")[0] == second.origin.rpartition("/")[0]
    assert {Path(each.origin.rpartition(":")[0]).name for each in (first, second)} == {
        "a.jsonl",
        "b.jsonl",
    }
    for each in (first, second):
        path, _, line = each.origin.rpartition(":")
        row = json.loads(Path(path).read_text().splitlines()[int(line) - 1])
        assert (
            helpers.decode(each.input_ids[each.mask])
            == f"{row['messages'][1]['content']}<|im_end|>"
        )


BAD: dict[str, list[Any]] = {
    "too many": [*rows(60), *[chat("q" * 200, "a")] * 3],
    "none can be used": [chat("q", "")] * 12,
    "one of two": [chat("q", "a"), chat("q", "")],
    "far too many, in several shards": [*rows(200), *[{"x": 1}] * 200],
}


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("case", BAD)
def test_a_dry_run_ends_as_the_run_would_end(
    case: str,
    split: Literal["train", "eval"],
    tmp_path: Path,
    tiny_spec: TokenizerSpec,
    small_shards: None,
) -> None:
    bad = helpers.write_jsonl(tmp_path / "bad.jsonl", BAD[case])
    good = helpers.write_jsonl(tmp_path / "good.jsonl", rows(50))
    config = helpers.config(tmp_path / "runs", bad) if split == "train" else None
    config = config or helpers.config(tmp_path / "runs", good, eval=[{"path": str(bad)}])
    with pytest.raises(UserError) as dry:
        describe(config, tiny_spec, split)
    assert not (tmp_path / "runs" / "tokens").exists()
    with pytest.raises(UserError) as real:
        prepare(config, tiny_spec, split)
    assert str(dry.value) == str(real.value)
    assert str(dry.value).startswith(f"data.{split}.0: ")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every corpus too large to be read completely."""
    monkeypatch.setattr(previews, "READ_ALL", 0)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("limit", "scanned"), [(200, 2**20), (200, 0), (10_000, 0)])
def test_a_large_corpus_is_estimated_from_a_part(
    corpus: Config,
    tiny_spec: TokenizerSpec,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    scanned: int,
) -> None:
    manifest = prepare(corpus, tiny_spec, "train").manifest
    monkeypatch.setattr(previews, "SCAN_ALL", scanned)
    preview = describe(corpus, tiny_spec, limit=limit)
    assert not preview.exact
    for name in ("rows", "packs", "tokens", "supervised"):
        assert getattr(preview, name) == pytest.approx(getattr(manifest, name), rel=0.15), name


def test_a_sorted_file_is_estimated_from_rows_of_all_its_places(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    # For 100 MB with short rows first, the dry run reported five times as many rows, and no long one.
    answers = [20] * 20_000 + [200 + number * 10 % 800 for number in range(12_000)]
    path = helpers.write_jsonl(
        tmp_path / "a.jsonl", [chat(f"q{n}", "a" * answer) for n, answer in enumerate(answers)]
    )
    assert path.stat().st_size > 8 * 2**20
    config = helpers.config(tmp_path / "runs", path, max_length=900, max_rejected=1.0)
    found = describe(config, tiny_spec)
    lengths = np.array(
        [
            len(f"q{n}") + answer + len("user\n\nassistant\n\n") + 4
            for n, answer in enumerate(answers)
        ]
    )
    assert not found.exact
    assert found.read < 2400
    assert found.rows == pytest.approx(len(answers), rel=0.05)
    assert not found.note
    assert found.tokens == pytest.approx(lengths[lengths <= 900].sum(), rel=0.05)
    assert found.rejected["too_long"] / found.read == pytest.approx((lengths > 900).mean(), rel=0.1)
