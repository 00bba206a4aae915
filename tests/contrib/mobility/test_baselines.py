from report import Past, TimeKernel, last, markov, most_frequent
from stays import Stay, When

NOON = When(2, 12 * 60)


def past(*stays: tuple[int, int, int]) -> Past:
    return Past.of(
        [Stay(place, n, When(day, hour * 60)) for n, (place, day, hour) in enumerate(stays)]
    )


def places(*names: int) -> Past:
    return past(*((name, 0, 0) for name in names))


def test_the_last_and_the_most_frequent_and_of_several_the_latest() -> None:
    assert last(places(1, 2, 3), NOON) == 3
    assert most_frequent(places(1, 2, 1, 3), NOON) == 1
    assert most_frequent(places(1, 2, 1, 2), NOON) == 2
    assert most_frequent(places(2, 1, 2, 1), NOON) == 1
    assert most_frequent(places(7), NOON) == 7


def test_markov_names_what_followed_and_else_the_most_frequent() -> None:
    assert markov(places(1, 2, 1, 3, 1, 2, 1), NOON) == 2
    assert markov(places(1, 2, 1, 3, 1), NOON) == 3
    assert markov(places(1, 2, 1, 2, 5), NOON) == 2
    assert markov(places(4), NOON) == 4


def test_the_kernel_weighs_hours_around_the_clock_and_kinds_of_days() -> None:
    kernel = TimeKernel(hours=1.0, other_days=0.25)
    assert kernel(past((1, 0, 8), (2, 1, 12), (1, 2, 20)), NOON) == 2
    assert (
        kernel(past((1, 0, 22), (2, 1, 12)), When(0, 30)) == 1
    )  # 2.5 hours before half past midnight
    assert kernel(past((1, 5, 12), (1, 6, 12), (2, 0, 12)), NOON) == 2  # 0.5 at weekends against 1
    assert kernel(past((1, 5, 12), (1, 6, 12), (2, 0, 12)), When(6, 12 * 60)) == 1
    # two stays at distances of 1 hour weigh 2 exp(-1/2) = 1.21, one at 0 weighs 1
    assert kernel(past((1, 0, 11), (1, 1, 13), (2, 1, 12)), NOON) == 1
    assert TimeKernel(hours=0.5)(past((1, 0, 11), (1, 1, 13), (2, 1, 12)), NOON) == 2
    # Weights that vanish still decide.
    assert TimeKernel(hours=0.01)(past((1, 0, 5), (2, 0, 9), (3, 0, 2)), NOON) == 2
