import pytest
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.sweep.report import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.25, "0.25"),
        (0.0003, "3e-4"),
        (1.23456e-05, "1.235e-5"),
        (2000000.0, "2e+6"),
        (0.0, "0"),
        (64.0, "64"),
        (123456.7, "123457"),
        (-0.5, "-0.5"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert text.number(value) == shown


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=6, unique=True))
def test_different_numbers_look_different(values: list[float]) -> None:
    shown = text.numbers(values)
    assert len(set(shown)) == len(set(values))
    assert [float(item) for item in shown] == pytest.approx(values, rel=1e-3)


def test_numbers_of_one_axis_have_one_notation() -> None:
    assert text.numbers([5e-4, 1e-3, 2e-3]) == ["5e-4", "1e-3", "2e-3"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(True, "true"), (None, "null"), (("q", 2), "q, 2"), (123456789, "123456789"), (" a\nb ", "a b")],
)
def test_values_look_as_in_yaml(value: object, shown: str) -> None:
    assert text.value(value) == shown


def test_long_values_are_cut() -> None:
    assert text.value("abcdef", 4) == "abc…"


def test_short_names_stay_different() -> None:
    fields = ["train.lr", "adapter.rank", "other.rank"]
    assert text.short(fields) == {"train.lr": "lr", "adapter.rank": "adapter.rank", "other.rank": "other.rank"}
