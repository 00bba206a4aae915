"""The limit on rejected rows, and the message about them."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.decided import DecidedConfig
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.prepare import prepare
from olora_ray.tokens.preview import describe_splits
from tests.said import said
from tests.tokens import helpers
from tests.tokens.helpers import chat, rows


def prepared(folder: Path, spec: TokenizerSpec, bad: int, good: int, **data: Any) -> None:
    """Prepare held-out rows of which so many are too long, beside good training rows."""
    path = helpers.write_jsonl(
        folder / "heldout.jsonl", [*rows(good), *[chat("q" * 200, "a")] * bad]
    )
    train = helpers.write_jsonl(folder / "train.jsonl", rows(40))
    prepare(
        helpers.config(folder / "runs", train, eval=[{"path": str(path)}], **data), spec, "eval"
    )


def test_one_odd_row_of_few_held_out_ones_does_not_stop_a_run(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    prepared(tmp_path, tiny_spec, bad=1, good=31)
    with pytest.raises(UserError, match=r"^data\.eval\.0: 2 of 32 rows cannot be used"):
        prepared(tmp_path / "two", tiny_spec, bad=2, good=30)
    with pytest.raises(UserError):
        prepared(tmp_path / "strict", tiny_spec, bad=1, good=31, max_rejected=0)


@pytest.mark.parametrize("read", [lambda *given: prepare(*given, "train"), describe_splits])
def test_rows_that_are_held_out_of_a_source_are_judged_with_its_training_rows(
    read: Callable[[DecidedConfig, TokenizerSpec], object], tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [*rows(100), *[chat("q", "")] * 30])
    for _ in ("first", "with the store of held-out rows"):
        config = helpers.config(tmp_path / "runs", path, eval_fraction=0.2)
        with pytest.raises(
            UserError, match=r"^data\.train\.0: 30 of 130 rows .*a\.jsonl:101: "
        ) as caught:
            read(config, tiny_spec)
    share = float(str(caught.value).split("data.max_rejected=")[1])
    allowed = helpers.config(tmp_path / "runs", path, eval_fraction=0.2, max_rejected=share)
    for _ in ("first", "with complete stores"):
        read(allowed, tiny_spec)
    if read is not describe_splits:
        with pytest.raises(UserError, match=r"^data\.train\.0: 30 of 130 rows"):
            read(config, tiny_spec)


def test_pairs_that_are_too_long_need_a_longer_sequence(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    """Regression: the message said to cut them, and pairs are not cut."""
    pairs = [{"prompt": "q" * n, "chosen": "a", "rejected": "b"} for n in (5, 60, 70)]
    path = helpers.write_jsonl(tmp_path / "a.jsonl", pairs)

    def config(most: int) -> DecidedConfig:
        source = {"path": str(path), "format": "preference"}
        return helpers.config(tmp_path / "runs", source, max_length=most)

    with pytest.raises(UserError) as caught:
        prepare(config(64), tiny_spec, "train")
    told = str(caught.value)
    assert "data.too_long" not in told
    most = int(told.split("raise data.max_length (up to ")[1].partition(",")[0])
    assert len(prepare(config(most), tiny_spec, "train")) > 0


@pytest.mark.parametrize(
    ("too_long", "shorter"), [("reject", "drop_turns or cut"), ("drop_turns", "cut")]
)
def test_the_remedy_is_enough(
    tmp_path: Path, tiny_spec: TokenizerSpec, too_long: str, shorter: str
) -> None:
    path = helpers.write_jsonl(
        tmp_path / "a.jsonl", [*rows(90), *[chat("q" * n, "a") for n in (150, 200, 170)]]
    )
    with pytest.raises(UserError) as caught:
        prepare(helpers.config(tmp_path / "runs", path, too_long=too_long), tiny_spec, "train")
    told = str(caught.value)
    longer = (
        "; raise data.max_length (up to 222, as far as the model has positions)"
        f" or set data.too_long to {shorter}, or allow them with "
    )
    assert longer in told
    share = float(told.split("data.max_rejected=")[1])
    for data in ({"max_rejected": share}, {"max_length": 222, "max_rejected": 0.0}):
        assert (
            prepare(
                helpers.config(tmp_path / "runs", path, **data), tiny_spec, "train"
            ).manifest.rows
            == 93
        )


def test_the_place_of_the_rejected_rows_is_told_whether_or_not_they_stop_the_run(
    tmp_path: Path, tiny_spec: TokenizerSpec
) -> None:
    for bad in (1, 9):
        path = helpers.write_jsonl(tmp_path / f"{bad}.jsonl", [*rows(90), *[chat("q", "")] * bad])
        stops = pytest.raises(UserError) if bad > 1 else contextlib.nullcontext()
        with said() as lines, stops:
            prepare(helpers.config(tmp_path / "runs", path), tiny_spec, "train")
        [line] = [line for line in lines if "rejected rows are listed in" in line]
        assert len(Path(line.split(" listed in ")[1]).read_text().splitlines()) == bad
