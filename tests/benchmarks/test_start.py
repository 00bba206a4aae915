"""The items of a start add up to the whole, from what is seen of a run."""

from typing import Any

import pytest


def test_items_add_up(benchmark: Any) -> None:
    module = benchmark("start")
    marks = {item: 100.0 + place for place, item in enumerate(module.ITEMS, 1)}
    marks[module.STEP] += 0.5
    found = module.items(100.0, marks)
    assert list(found) == list(module.ITEMS)
    assert found[module.STEP] == 1.5
    assert sum(found.values()) == pytest.approx(marks[module.STEP] - 100.0)
    printed = module.starts_table([found, dict.fromkeys(found, 2.0)], [5.0])
    assert "to the first step" in printed
    peer = next(line for line in printed.splitlines() if line.startswith("PEFT and Trainer"))
    assert peer.split()[-3:] == ["5.00"] * 3


def test_other_starts_have_targets_of_their_own(benchmark: Any) -> None:
    module = benchmark("start")
    printed = module.others_table({module.STANDING: [5.0, 7.0, 5.5], module.AGAIN: [20.0]})
    assert f"{module.STANDING}: 5.5 s, target 6: met" in printed
    assert f"{module.AGAIN}: 20.0 s, target 15: missed" in printed


def test_a_trial_waits_for_the_one_whose_place_it_takes(benchmark: Any) -> None:
    module = benchmark("start")
    # Two side by side; the third takes the place of the first.
    trials = [(10.0, 0.0, 4.0, 3.0), (12.0, 0.5, 4.5, 3.0), (20.0, 10.8, 15.0, 3.0)]
    assert module.waits(trials) == [(pytest.approx(2.0), 3.0)]
    line = module.trials_line(1, module.waits(trials))
    assert "a neighbour trains meanwhile: 2.00 s until its first step begins" in line
    assert "which takes 3.00 s" in line


def test_the_imports_of_a_process_are_seconds_of_a_processor(benchmark: Any) -> None:
    module = benchmark("start")
    assert abs(module.processor_seconds("sys")) < module.processor_seconds("numpy, asyncio, http.client")
