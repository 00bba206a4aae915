import re
from collections.abc import Callable
from decimal import Decimal
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.common.errors import UserError

Script = Callable[[str], ModuleType]


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "last"),
    [
        ("3 + 4 = 7\n#### 7", "#### 7", 1.0, 1.0),
        ("####7.0", "#### 7", 1.0, 1.0),
        ("#### $1,007", "#### 1007", 1.0, 1.0),
        ("It is 7.", "#### 7", 0.0, 1.0),
        ("#### 7\nThe answer is: 8", "#### 7", 1.0, 0.0),
        ("#### 8\n#### 7", "#### 7", 1.0, 1.0),
        ("#### -7", "#### 7", 0.0, 0.0),
        ("#### -7", "so -7\n#### -7", 1.0, 1.0),
        ("12-7", "#### 7", 0.0, 1.0),
        ("#### seven", "#### 7", 0.0, 0.0),
        ("", "#### 7", 0.0, 0.0),
    ],
)
def test_final_number(script: Script, prediction: str, reference: str, exact: float, last: float) -> None:
    assert script("scorers").final_number(prediction, reference) == {"exact_match": exact, "last_number": last}


def test_a_reference_without_a_number_is_the_users_mistake(script: Script) -> None:
    with pytest.raises(UserError, match=r"evaluation.scorer: final_number needs .* not '57'"):
        script("scorers").final_number("#### 57", "57")


@pytest.mark.parametrize(
    ("prediction", "exact", "answered"),
    [("yes", 1.0, 1.0), (" Yes, it is.", 1.0, 1.0), ("No.", 0.0, 1.0), ("Yesterday", 0.0, 0.0), ("", 0.0, 0.0)],
)
def test_yes_no(script: Script, prediction: str, exact: float, answered: float) -> None:
    assert script("scorers").yes_no(prediction, "yes") == {"exact_match": exact, "answered": answered}


def test_a_reference_that_is_neither_is_the_users_mistake(script: Script) -> None:
    with pytest.raises(UserError, match=r"evaluation\.scorer: yes_no needs yes or no as the reference, not 'true'"):
        script("scorers").yes_no("yes", "true")


@given(value=st.decimals(-(10**9), 10**9, places=2), before=st.text(), after=st.text(alphabet="abc .\n"))
def test_a_marked_number_is_found_however_it_is_written(
    script: Script, value: Decimal, before: str, after: str
) -> None:
    found = script("scorers").marked_number
    assert found(f"{before}#### {value:f} {after}") == value
    assert found(f"{before}####{value:,f}") == value


@given(prediction=st.text())
def test_any_answer_can_be_scored(script: Script, prediction: str) -> None:
    for scores in (
        script("scorers").final_number(prediction, "#### 1"),
        script("scorers").yes_no(prediction, "no"),
    ):
        assert set(scores.values()) <= {0.0, 1.0}
    assert script("scorers").number(prediction) is None or re.search(r"\d", prediction)
