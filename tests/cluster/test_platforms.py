"""Of what kind workers are, and what is said when it changes: their number is not part of it."""

import pytest
import torch

from olora_ray.cluster.worker_context import Platform, platform_warning, record_platforms
from tests.crew import Crews

CPU = torch.device("cpu")
ONE: Platform = {"device": "cpu", "processor": "A (AVX512)", "threads": "1", "torch": "2.9.0"}
OTHER = ONE | {"processor": "B (AVX2)"}


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ([], [ONE], None),
        ([ONE], [ONE], None),
        ([ONE], [OTHER | {"torch": "3.0"}], "(processor: A (AVX512), B (AVX2); torch: 2.9.0, 3.0)"),
        ([ONE], [ONE, OTHER], "the workers differ (processor: A (AVX512), B (AVX2))"),
    ],
)
def test_what_changes_is_said_in_one_line(
    before: list[Platform], now: list[Platform], words: str | None
) -> None:
    line = platform_warning(before, now)
    assert (line is None) == (words is None)
    assert words is None or (line is not None and words in line and "\n" not in line)


def test_all_workers_note_the_kinds_of_all(crew: Crews) -> None:
    alike, other = crew(2).run(_noted, (1, 1)), crew(2).run(_noted, (1, 2))
    assert [len(found) for found in alike] == [1, 1]
    assert other[0] == other[1]
    assert [found["threads"] for found in other[0]] == ["1", "2"]


def _noted(threads: tuple[int, ...]) -> list[Platform]:
    torch.set_num_threads(threads[torch.distributed.get_rank()])
    try:
        return record_platforms([], CPU)
    finally:
        torch.set_num_threads(1)
