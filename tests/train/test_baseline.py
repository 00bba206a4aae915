"""The base model's results are kept, and read only by the same run."""

from pathlib import Path

import pytest

from olora_ray.train.scoring import Baseline

RUN = {"base model": "b", "adapter": "a"}


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
    assert (
        Baseline.read(str(tmp_path / "baseline.json"), RUN, 1 if "answers" in text else 0) is None
    )
