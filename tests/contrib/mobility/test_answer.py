import answer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.common.errors import UserError
from olora_ray.train import scoring


@given(st.integers(0, 2**40), st.text(max_size=20))
def test_what_is_written_is_read(place: int, rest: str) -> None:
    before = rest.replace("{", "").replace("}", "")
    assert answer.read(f"{before}{answer.write(place)}{rest}") == place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('Pred results: {\n"prediction": 12\n}', 12),
        ("{'prediction': 12, 'reason': 'home'}", 12),
        ('{"prediction": "12, 13"}', 12),
        ('{"prediction": "12"} {"prediction": 13}', 12),
        (f'{{"prediction": {"1" * 19}}}', None),
        ('{"prediction": 12.0}', None),
        ('{"prediction": true}', None),
        ('{"prediction": "home"}', None),
        ('{"place": 12}', None),
        ("12", None),
        ("{" + "[" * 5000 + "}", None),
        ("", None),
    ],
)
def test_the_first_braces_decide(text: str, place: int | None) -> None:
    assert answer.read(text) == place


def test_the_scorer() -> None:
    scorer = scoring.resolve("mobility.answer:next_place")
    assert scorer('{"prediction": 12}', '{"prediction": 12}') == {"acc_at_1": 1.0, "valid": 1.0}
    assert scorer('{"prediction": 13}', '{"prediction": 12}') == {"acc_at_1": 0.0, "valid": 1.0}
    assert scorer("no idea", '{"prediction": 12}') == {"acc_at_1": 0.0, "valid": 0.0}
    with pytest.raises(UserError, match=r"evaluation\.scorer: next_place needs references like"):
        scorer('{"prediction": 12}', "twelve")
