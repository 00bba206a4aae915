"""The times of recovery.py are read from what a run leaves; every case has a line of the table."""

from pathlib import Path
from typing import Any

from olora_ray.config.command_line import read_arguments
from tests.recovery.moments import Done


def done(*when: tuple[int, float]) -> list[Done]:
    return [Done(f"step {step}", at, 1) for step, at in when]


def test_what_came_before_an_event_is_not_its_cost(benchmark: Any) -> None:
    module = benchmark("back_at_work")
    steps = done((1, 1), (2, 7), (2, 8), (3, 9), (4, 10), (4, 13), (5, 14), (6, 18), (7, 19))
    assert module.summary(steps, 10.5, 2.5) == module.Sample(seconds=2.5, again=1, gap=4.0, step=1.0)


def test_the_median_and_the_most_of_the_rest_are_shown(benchmark: Any) -> None:
    module = benchmark("back_at_work")
    kill, other, *_ = module.ON_ONE_HOST
    good = [module.Sample(3.0, 0, 4.0, 1.0), module.Sample(9.0, 1, 10.0, 3.0), module.Sample(4.25, 0, 5.0, 1.5)]
    assert module.row(kill, good) == (kill.what, "4.2", "3.0 - 9.0", "1.5", "24", "met", "1", "10.0")
    slow, twice = [module.Sample(25.1, 0, 6.0)], [module.Sample(1.0, 2, 3.0)]
    assert [module.row(other, samples)[5] for samples in (slow, twice, [])] == ["missed", "missed", "not measured"]


def test_every_case_has_a_line(benchmark: Any) -> None:
    module = benchmark("back_at_work")
    kill, *_ = module.ON_ONE_HOST
    lines = module.targets({kill: [module.Sample(3.0, 0, 4.0)]}).splitlines()[2:]
    assert len(lines) == len(module.ON_HOSTS) + len(module.ON_ONE_HOST) == 8
    assert [" not measured " in line for line in lines] == [False] + 7 * [True]


def test_the_settings_are_those_of_a_run(benchmark: Any, tmp_path: Path) -> None:
    module = benchmark("back_at_work")
    words = module.settings(tmp_path / "one", tmp_path / "models", module.ELASTIC)
    config, _ = read_arguments([str(module.CONFIG), *words], usage="")
    assert config.run.storage == str(tmp_path / "one")
    assert (config.cluster.workers, config.cluster.max_failures) == ((1, 2), -1)
    assert (config.train.log_every, config.train.checkpoint_every) == (1, 10)
