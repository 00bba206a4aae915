import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.sweep.report import axis
from tests.sweep.odd import NAN

NUMBERS = st.lists(st.floats(-1e6, 1e6) | st.integers(-1000, 1000), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.0001, 0.0003, 0.001], "log"),
        ([4, 8, 16], "log"),
        ([1, 2, 3], "linear"),
        ([0, 0.001], "linear"),
        ([-1, 10], "linear"),
        ([True, False], "category"),
        ([1, None], "category"),
        (["a"], "category"),
        ([1, True], "category"),
    ],
)
def test_the_kind_follows_from_the_values(values: list[object], kind: str) -> None:
    assert axis.of(values).kind == kind


@given(NUMBERS)
def test_the_order_of_numbers_is_kept_and_the_ends_are_used(values: list[float]) -> None:
    found = axis.of(values)
    places = [found.position(value) for value in sorted(values)]
    assert None not in places
    assert places == sorted(places)  # type: ignore[type-var]
    assert {places[0], places[-1]} == ({0.0, 1.0} if min(values) < max(values) else {0.5})


@given(NUMBERS)
def test_ticks_are_apart_and_tell_different_values_apart(values: list[float]) -> None:
    ticks = axis.of(values).ticks
    assert ticks
    assert all(0 <= place <= 1 for place, _ in ticks)
    assert all(after - before >= 0.07 for (before, _), (after, _) in itertools.pairwise(ticks))
    assert len({label for _, label in ticks}) == len(ticks)


def test_nan_and_what_is_no_number_have_no_place() -> None:
    found = axis.of([1.0, 2.0, NAN])
    assert (found.kind, found.position(NAN), found.position("x"), found.position(True)) == ("linear", None, None, None)
    assert axis.of(["a", NAN]).position("b") is None


@pytest.mark.parametrize(("mode", "end"), [("min", 1.0), ("max", 0.0)])
def test_a_diverged_trial_does_not_flatten_the_others(mode: str, end: float) -> None:
    sign = 1 if mode == "min" else -1
    good = [sign * value for value in (1.0, 1.02, 1.04, 1.06, 1.08)]
    found = axis.of_metric([*good, sign * 1e9, sign * 2e9, None, NAN], mode)  # type: ignore[arg-type]
    assert found.position(sign * 1e9) == found.position(sign * 2e9) == end
    assert (end, "worse") in found.ticks
    places = [found.position(value) for value in good]
    assert max(places) - min(places) == pytest.approx(0.9)  # type: ignore[type-var,operator]
    assert end not in places


def test_without_outliers_nothing_is_cut() -> None:
    found = axis.of_metric([1.0, 1.1, 1.2, 1.3], "min")
    assert (found.low, found.high, found.worse) == (1.0, 1.3, "")
