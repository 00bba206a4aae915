"""Frequency with which the default gate promotes a challenger that is as good as the champion, and a better one."""

import pytest

from tests.retrain import nights
from tests.retrain.nights import KINDS


def test_an_equal_challenger_is_rarely_promoted_and_a_better_one_often() -> None:
    """A part of the kinds; 60 nights at 0.13 % have more than 2 promotions once in 15,000 times."""
    for kind in (KINDS[1], KINDS[4], KINDS[7]):
        assert nights.promoted(kind, 60, 0.0) * 60 <= 2, kind.name
    for kind in (KINDS[2], KINDS[8]):
        assert nights.promoted(kind, 20, nights.BETTER) >= 0.6, kind.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_equal_challenger_is_promoted_in_at_most_1_percent_of_1000_nights(
    kind: nights.Kind,
) -> None:
    assert nights.promoted(kind, 1000, 0.0) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("world", nights.WORLDS, ids=lambda world: world.name)
def test_shrinking_ends_no_year_worse_and_loses_no_promotion(world: nights.World) -> None:
    """On 80 rows and on 40 pairs. In a world that is right at the limit, 40 years have over 6 worse ones never."""
    for kind in (KINDS[1], KINDS[7]):
        plain = [nights.year(kind, world, number, shrink=False) for number in range(20)]
        shrunk = [nights.year(kind, world, number, shrink=True) for number in range(20)]
        assert sum(year.worse for year in shrunk) <= 3
        assert sum(year.better for year in shrunk) >= sum(year.better for year in plain)


@pytest.mark.slow
def test_hardly_a_year_of_corrections_ends_with_a_worse_champion() -> None:
    """Ten nights of 40 held-out pairs each."""
    assert nights.worse_years(KINDS[7], 100) <= 0.03
