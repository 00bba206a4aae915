"""The base model's results are kept, and read only by the same run."""

from pathlib import Path

import pytest

from olora_ray.train.scoring import Baseline

RUN = {"base model": "b", "adapter": "a"}


def test_it_comes_back_exactly(tmp_path: Path) -> None:
    place = str(tmp_path / "baseline.json")
    assert Baseline.read(place, RUN, 2) is None
    kept = Baseline(1 / 3, [[1, 2], []])
    kept.write(place, RUN)
    assert Baseline.read(place, RUN, 2) == kept
    assert Baseline.read(place, RUN | {"adapter": "other"}, 2) is None
    assert Baseline.read(place, RUN, 3) is None


def test_a_run_without_questions_or_rows(tmp_path: Path) -> None:
    place = str(tmp_path / "baseline.json")
    Baseline(None, None).write(place, RUN)
    assert Baseline.read(place, RUN, 0) == Baseline(None, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"identity": {}}',
        '{"identity": {"base model": "b", "adapter": "a"}}',
        '{"identity": {"base model": "b", "adapter": "a"}, "loss": 1, "answers": [[1e999]]}',
        '{"identity": {"base model": "b", "adapter": "a"}, "loss": NaN, "answers": [[1]]}',
    ],
)
def test_a_damaged_one_is_measured_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "baseline.json").write_text(text)
    assert Baseline.read(str(tmp_path / "baseline.json"), RUN, 1 if "answers" in text else 0) is None


def test_a_storage_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Baseline(1.0, None).write(str(tmp_path / "file" / "baseline.json"), RUN)
