"""Metrics from row results equal those that are computed from the model directly, and intervals cover the truth."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.common import records
from olora_ray.common.statistics import Interval, difference
from olora_ray.evaluation import held_out
from olora_ray.evaluation.held_out import Measurer
from olora_ray.evaluation.rows import RowResults, compare
from olora_ray.model.source import BaseModel
from olora_ray.train.generate import questions
from tests import tiny
from tests.refused import refused


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a folder, without a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama().save_pretrained(folder)
    return folder


ORIGINS = ((0, 0), (0, 1), (1, 0))
ROWS = RowResults("store", (2, 3, 5), (4.0, 3.0, 20.0), {"exact_match": {0: 1.0, 2: 0.0}}, ORIGINS)
BETTER = RowResults(
    "store", (2, 3, 5), (2.0, 3.0, 15.0), {"exact_match": {0: 1.0, 2: 1.0}}, ORIGINS
)


def test_metrics_are_means_over_tokens_and_over_answers() -> None:
    assert ROWS.metric("eval/loss") == pytest.approx(2.7)
    assert ROWS.metric("eval/perplexity") == pytest.approx(math.exp(2.7))
    assert ROWS.metric("eval/exact_match") == 0.5
    assert ROWS.names() == ["eval/loss", "eval/perplexity", "eval/exact_match"]


@pytest.mark.parametrize("name", ROWS.names())
def test_the_middle_of_a_comparison_is_the_difference_of_the_metrics(name: str) -> None:
    found = compare(name, BETTER, ROWS).interval
    assert found.mean == pytest.approx(BETTER.metric(name) - ROWS.metric(name))
    assert found.low <= found.mean <= found.high


def labelled(answers: str) -> RowResults:
    """Results on eight rows, of which two come from one row of a file, with one letter as answer to each."""
    kept = {
        row: {"prompt": "", "reference": wanted, "answer": answer}
        for row, (wanted, answer) in enumerate(zip("aaabbbcc", answers, strict=True))
    }
    origins = ((0, 0), *((0, row) for row in range(7)))
    ones = (1,) * 8
    return RowResults("store", ones, (1.0,) * 8, {}, origins, answers=kept, scorer="macro_f1")


def test_a_score_of_all_answers_is_computed_again_for_each_draw() -> None:
    good = labelled("aaabbbca")
    bad = labelled("aaaaaaaa")
    assert good.names()[-1] == "eval/macro_f1"
    assert bad.metric("eval/macro_f1") == pytest.approx(6 / 11 / 3)
    assert bad.only([0, 1, 3]).metric("eval/macro_f1") == pytest.approx(0.4)
    found = good.gain(bad, "eval/macro_f1")
    assert (found.rows, found.groups) == (8, 7)
    shift = good.metric("eval/macro_f1") - bad.metric("eval/macro_f1")
    assert found.interval.mean == pytest.approx(shift)
    assert found.interval.low < shift < found.interval.high
    turned = compare("eval/macro_f1", bad, good).interval
    assert turned.mean == pytest.approx(-shift)
    assert good.gain(good, "eval/macro_f1").interval == Interval(0.0, 0.0, 0.0)


def test_stored_results_with_answers_are_read_again_and_so_are_those_without(
    tmp_path: Path,
) -> None:
    file = str(tmp_path / "rows.json")
    records.write(file, labelled("aaabbbca"))
    assert records.read(file, RowResults) == labelled("aaabbbca")
    earlier = {
        name: value for name, value in asdict(ROWS).items() if name not in ("answers", "scorer")
    }
    records.write(file, earlier)
    assert records.read(file, RowResults) == ROWS


def test_other_tokens_are_not_compared() -> None:
    with refused("held-out rows"):
        compare("eval/loss", ROWS, RowResults("other", (2,), (1.0,), {}, ((0, 0),)))


def test_rows_of_the_store_that_come_from_one_row_of_a_file_are_one_group() -> None:
    """A chat that its template splits gives one example per answer, and a long text gives several pieces."""
    whole = compare("eval/loss", BETTER, ROWS)
    assert (whole.rows, whole.groups) == (3, 3)
    same = [
        RowResults(one.data, one.tokens, one.losses, one.scores, ((0, 0), (0, 0), (1, 0)))
        for one in (BETTER, ROWS)
    ]
    assert compare("eval/loss", *same).groups == 2
    assert compare("eval/loss", *(each.grouped(["a"] * 3) for each in same)).groups == 1


@pytest.mark.parametrize("attention", ["segments", "sdpa"])
def test_each_example_has_the_loss_it_has_alone(model_folder: Path, attention: str) -> None:
    measurer = Measurer(
        base(model_folder),
        None,
        tiny.decided(model__attention=attention, model__dtype="float32"),
        (1,),
        TRIED,
    )
    packs = [tiny.pack(40, 30, 25, seed=1), tiny.pack(50, seed=2)]
    found = measurer(tuple(packs))
    assert [number for [number] in found] == pytest.approx(
        [plain_loss(measurer.model, item) for item in tiny.unpacked(packs)], rel=1e-5
    )


def test_answers_of_an_adapter_are_those_of_the_adapted_model(
    model_folder: Path, tmp_path: Path
) -> None:
    settings = tiny.decided(model__dtype="float32", evaluation__max_new_tokens=6)
    trainer = tiny.trainer(
        settings,
        "segments",
        held_out.load_adapted(base(model_folder), None, settings, torch.device("cpu")),
    )
    trainer.flat.vector.copy_(
        0.1 * torch.randn(trainer.flat.vector.shape, generator=torch.Generator().manual_seed(0))
    )
    weights = {name: layer.weights() for name, layer in trainer.adapted.items()}
    write_adapter(
        weights, settings.adapter, str(model_folder), tmp_path / "adapter", trainer.loss.model
    )

    store: Any = tiny.store(2)
    packs, asked = tuple(store[i] for i in range(2)), tuple(questions(store, 5))
    measurer = Measurer(base(model_folder), str(tmp_path / "adapter"), settings, (1,), TRIED)
    plain = Measurer(base(model_folder), None, settings, (1,), TRIED)
    expected = [plain_loss(trainer.loss.model, item) for item in tiny.unpacked(packs)]
    assert [number for [number] in measurer(packs)] == pytest.approx(expected, rel=1e-4)
    assert [number for [number] in plain(packs)] != pytest.approx(expected, rel=1e-2)
    assert measurer(asked) == [one_by_one(trainer.loss.model, item.prompt, 6) for item in asked]


def test_an_adapter_without_its_files_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with refused("adapter_config.json"):
        Measurer(base(model_folder), str(tmp_path), tiny.config(), (1,), TRIED)


TRIED = [tiny.pack(9, 7), tiny.pack(12)]


def base(folder: Path) -> BaseModel:
    return BaseModel(str(folder), str(folder), "")


def plain_loss(model: Any, example: Any) -> float:
    """Return the loss summed over the supervised tokens of one example, from all logits of the model itself."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    chosen = torch.from_numpy(example.supervised[1:])
    return float(F.cross_entropy(logits[chosen].float(), ids[0, 1:][chosen], reduction="sum"))


def one_by_one(model: Any, prompt: tuple[int, ...], limit: int) -> list[int]:
    """Append the most probable token until the end token (1)."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            token = int(
                model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
            )
        if token == 1:
            break
        ids.append(token)
    return ids[len(prompt) :]


VALUES = st.lists(st.tuples(*[st.floats(-10, 10)] * 2, st.floats(0.1, 10)), min_size=1, max_size=30)


def columns(rows: list[tuple[float, float, float]]) -> tuple[list[float], list[float], list[float]]:
    ours, theirs, weights = zip(*rows, strict=True)
    return list(ours), list(theirs), list(weights)


@given(VALUES)
def test_bounds_surround_the_middle_of_the_draws_and_swapping_turns_the_sign(
    rows: list[tuple[float, float, float]],
) -> None:
    ours, theirs, weights = columns(rows)
    there, back = (
        difference(ours, theirs, weights, draws=200),
        difference(theirs, ours, weights, draws=200),
    )
    assert there.mean == pytest.approx(
        np.average(np.subtract(ours, theirs), weights=weights), abs=1e-9
    )
    assert there.low <= there.high
    assert (there.mean, there.low, there.high) == pytest.approx(
        (-back.mean, -back.high, -back.low), abs=1e-9
    )


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        hard = rng.normal(scale=5.0, size=80)  # for both: must not widen the interval
        ours, theirs = hard + 0.3 + rng.normal(size=80), hard + rng.normal(size=80)
        found = difference(ours.tolist(), theirs.tolist(), level=0.9, draws=400, seed=seed)
        covered += found.low <= 0.3 <= found.high
        assert found.high - found.low < 1.0
    assert 163 <= covered <= 197  # 180 expected, 4 standard deviations each way


@pytest.mark.parametrize(("groups", "level"), [(2, 0.95), (4, 0.95), (6, 0.99)])
def test_few_groups_are_covered_as_well(groups: int, level: float) -> None:
    """Quantiles alone cover the truth in half of the cases for two groups, in 74 % for three, in 87 % for four."""
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(200):
        values = rng.normal(size=groups)[np.arange(3 * groups) % groups]
        found = difference(
            values,
            np.zeros(3 * groups),
            None,
            level,
            300,
            seed,
            groups=np.arange(3 * groups) % groups,
        )
        assert found.low <= found.mean <= found.high
        covered += found.low <= 0.0 <= found.high
    expected, error = 200 * level, np.sqrt(200 * level * (1 - level))
    assert covered > expected - 4.5 * error


def test_two_groups_have_the_interval_of_students_t() -> None:
    found = difference([1.0, 2.0], [0.0, 0.0], draws=20_000)
    # standard error 0.5, and 12.706 of them with one degree of freedom
    assert (found.mean, found.low, found.high) == pytest.approx(
        (1.5, 1.5 - 6.353, 1.5 + 6.353), abs=0.1
    )
    assert difference([1.0] * 2, [0.0] * 2).low == 1.0, "without a spread there is no width"


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_rows_without_a_partner_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError):
        difference(ours, theirs)


def test_groups_are_drawn_as_a_whole() -> None:
    ours = np.repeat([1.0, 2.0, 6.0, 3.0], 5)
    grouped = difference(ours, np.zeros(20), groups=np.repeat([7, 3, 9, 1], 5))
    single = difference([1.0, 2.0, 6.0, 3.0], [0.0] * 4)
    assert (grouped.mean, grouped.low, grouped.high) == pytest.approx(
        (single.mean, single.low, single.high), abs=0.2
    )
    assert grouped.low < 1.0 < 6.0 < grouped.high  # of four groups beyond them all
    assert difference(ours, np.zeros(20)).high < grouped.high
    one = difference(ours, np.zeros(20), groups=[0] * 20)
    assert (one.mean, one.low, one.high) == (3.0, 3.0, 3.0)


def test_more_groups_than_are_drawn_are_pooled_and_give_the_same_width() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0.3, 1.0, 100_000)
    found = difference(values, np.zeros(len(values)), rng.uniform(1, 200, len(values)))
    assert found.low < 0.3 < found.high
    # 2 x 1.96 standard errors, with the weights' own unevenness: E[w^2] / E[w]^2 = 4/3
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(4 / 3 / len(values)), rel=0.1)
