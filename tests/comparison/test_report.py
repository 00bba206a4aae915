"""The sentences of the report are statistically right, and its figures show the differences."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comparison import report
from comparison.record import Against, ComparisonRecord, Point, origin, recorded
from comparison.statistics import Interval
from tests.comparison import made


def against(low: float, high: float) -> Against:
    return Against((low + high) / 2, 0.02, Interval(low, high), Interval(low, high))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.05, -0.02, "better: its loss is lower by at least 0.01"),
        (0.02, 0.05, "worse: its loss is higher by at least 0.01"),
        (-0.03, -0.002, "its loss is lower, but perhaps by less than 0.01"),
        (0.002, 0.03, "its loss is higher, but perhaps by less than 0.01"),
        (-0.006, 0.008, "equal for practical purposes, because less than 0.01 (compare.relevant) does not matter"),
        (-0.006, -0.001, "does not matter; its loss is lower, but by less"),
        (-0.02, 0.008, "undecided: its loss was lower, but this may be luck"),
        (float("-inf"), float("inf"), "undecided"),
    ],
)
def test_conclusions(low: float, high: float, said: str) -> None:
    assert said in report.conclusion(against(low, high), 0.01)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> ComparisonRecord:
    folder: Path = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        work = made.running(patch, made.comparison(folder), made.Cluster())
        tuning = work.tune()
        return recorded(work, tuning, work.train(tuning), "2 CPUs")


def test_a_sentence_names_all_that_it_is_of(record: ComparisonRecord) -> None:
    [said] = report.sentences(record)
    for part in (
        "nats per token",
        "95% interval",
        "4 seeds x 60 test rows",
        "gsm.jsonl",
        "SmolLM2-135M",
        "60 other rows",
    ):
        assert part in said
    assert "better" not in said
    assert "But" not in said


def test_reservations(record: ComparisonRecord) -> None:
    lora, olora = record.arms
    assert olora.tuned is not None
    edge = replace(olora, tuned=replace(olora.tuned, inside=False))
    few = replace(record, seeds=(4, 5), arms=(lora, edge), base_test=0.5)
    said = report.sentence(few, edge)
    assert "But lora ends with a higher loss than the base model; the best learning rate of olora is at the end" in said
    assert "2 seeds are few" in said


LOSSES = (0.35, 0.33, 0.38)


def drawn(base: float) -> Any:
    """Return the axes of losses against learning rates, with a base model of this loss."""
    points = [Point("lora", 2.0**number, 2.0**number * 1e-3, loss) for number, loss in enumerate(LOSSES)]
    arms = [SimpleNamespace(name="lora", lr=None)]
    record: Any = SimpleNamespace(tuning_seed=17, points=points, base_tuning=base, arms=arms)
    return report.rates(record).axes[0]


@pytest.mark.parametrize(("base", "shown"), [(0.45, True), (2.58, False), (float("inf"), False)])
def test_learning_rates_can_be_told_apart_however_much_worse_the_base_model_is(base: float, shown: bool) -> None:
    """With a base model at 2.58 in the picture, all other losses lay on one line."""
    axes = drawn(base)
    low, high = axes.get_ylim()
    assert (high > base) == shown
    assert (max(LOSSES) - min(LOSSES)) / (high - low) > (0.3 if shown else 0.8)
    texts = " ".join(text.get_text() for text in axes.figure.findobj(lambda each: hasattr(each, "get_text")))
    assert ("base model: 2.580, above the picture" in texts) == (base == 2.58)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("package://m/SmolLM2-135M.Q4_1.gguf", "SmolLM2-135M.Q4_1.gguf (dequantised)"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_the_origin_of_a_dequantised_base_model_is_named(name: str, shown: str) -> None:
    assert origin(name) == shown
