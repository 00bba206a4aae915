"""The number of trainings and their time."""

from comparison.run import time_line


def test_the_time_of_the_trainings_that_are_left() -> None:
    # Five rounds of the tuning with one evaluation, four of the final phase with four: 5 x 110 s + 4 x 140 s.
    assert (
        time_line((100.0, 10.0), 10, 8, side_by_side=2)
        == "left to do: 18 trainings, 2 at a time: about 18 min 30 s"
    )
    unknown = "left to do: 1 training, 4 at a time; their time is not estimated: it is measured on CPUs only"
    assert time_line("it is measured on CPUs only", 1, 0, 4) == unknown
