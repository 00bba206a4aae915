from collections.abc import Callable
from types import ModuleType

import pytest

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
def test_final_number(
    script: Script, prediction: str, reference: str, exact: float, last: float
) -> None:
    assert script("scorers").final_number(prediction, reference) == {
        "exact_match": exact,
        "last_number": last,
    }


def test_a_reference_without_a_number_is_the_users_mistake(script: Script) -> None:
    with pytest.raises(UserError, match=r"evaluation.scorer: final_number needs .* not '57'"):
        script("scorers").final_number("#### 57", "57")
