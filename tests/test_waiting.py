import itertools

import pytest

from tests.waiting import until


def test_it_ends_with_the_condition_or_with_an_error() -> None:
    number = itertools.count()
    until(lambda: next(number) == 3, pause=0.001)
    assert next(number) == 4
    with pytest.raises(AssertionError, match="not within 0 s"):
        until(lambda: False, seconds=0)
