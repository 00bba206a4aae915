"""The sentences of the report are statistically right, and its figures show the differences."""

from dataclasses import replace
from pathlib import Path

import pytest

from comparison import report
from comparison.record import Against, ComparisonRecord, recorded
from olora_ray.evaluation.statistics import Interval
from tests.comparison import made


def against(low: float, high: float) -> Against:
    interval = Interval((low + high) / 2, low, high)
    return Against(interval.mean, 0.02, interval, interval)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.05, -0.02, "better: its loss is lower by at least 0.01"),
        (0.02, 0.05, "worse: its loss is higher by at least 0.01"),
        (0.002, 0.03, "its loss is higher, but perhaps by less than 0.01"),
        (-0.006, 0.008, "equal for practical purposes, because less than 0.01 (compare.relevant) does not matter"),
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
