"""A group of workers exchanges values; a process alone gets its own back."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from tests.crew import Crew


def exchanged() -> dict[str, Any]:
    own = collectives.rank()
    total, sent = torch.tensor([1.0 + own]), torch.tensor([10.0 * own])
    collectives.sum_in_place(total)
    collectives.broadcast_in_place(sent, collectives.world_size() - 1)
    return {
        "world": collectives.world_size(),
        "sum": total.item(),
        "sent": sent.item(),
        "first": collectives.from_first(f"worker {own}"),
        "all": collectives.gather(f"worker {own}"),
    }


def with_problems(*problems: str | None) -> None:
    collectives.raise_together(problems[collectives.rank()])


def test_a_process_alone_gets_its_own_values_back() -> None:
    assert exchanged() == {
        "world": 1,
        "sum": 1.0,
        "sent": 0.0,
        "first": "worker 0",
        "all": ["worker 0"],
    }
    with_problems(None)
    with pytest.raises(UserError):
        with_problems("broken")


def test_all_workers_get_the_same(crew: Callable[[int], Crew]) -> None:
    expected = {
        "world": 2,
        "sum": 3.0,
        "sent": 10.0,
        "first": "worker 0",
        "all": ["worker 0", "worker 1"],
    }
    assert crew(2).run(exchanged) == [expected, expected]


def test_the_problem_of_one_worker_is_raised_on_all(crew: Callable[[int], Crew]) -> None:
    assert crew(2).run(with_problems, None, None) == [None, None]
    assert [str(error) for error in crew(2).run(with_problems, None, "one is broken")] == [
        "one is broken"
    ] * 2
    assert [str(error) for error in crew(2).run(with_problems, "first", "second")] == ["first"] * 2


def _swapped() -> list[list[int]]:
    here, workers = collectives.rank(), collectives.world_size()
    # Worker w sends w + o bytes to worker o: 0 from the first to itself.
    outgoing = [
        torch.full((here + other,), 10 * here + other, dtype=torch.uint8)
        for other in range(workers)
    ]
    return [
        part.tolist()
        for part in collectives.swap(outgoing, [other + here for other in range(workers)])
    ]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_worker_gets_what_the_others_send_it(
    crew: Callable[[int], Crew], workers: int
) -> None:
    for here, found in enumerate(crew(workers).run(_swapped)):
        assert found == [[10 * other + here] * (other + here) for other in range(workers)]


def _waited(folder: Path) -> tuple[float, bool]:
    """Seconds until all were here, and whether the last one was by then."""
    began = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(0.5)
        (folder / "there").touch()
    collectives.wait_for_all(0.01)
    return time.monotonic() - began, (folder / "there").exists()


def test_all_wait_for_the_last_one(crew: Callable[[int], Crew], tmp_path: Path) -> None:
    for number in range(2):  # each time anew
        folder = tmp_path / str(number)
        folder.mkdir()
        for seconds, there in crew(3).run(_waited, folder):
            assert there
            assert seconds >= 0.4
    collectives.wait_for_all()  # alone there is nobody to wait for
