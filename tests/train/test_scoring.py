import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from olora_ray.train.scoring import (
    SCORERS,
    Judge,
    Row,
    exact_match,
    json_fields,
    means,
    resolve,
)
from tests.refused import refused
from tests.said import said

REFERENCE = '{"category": "refund", "order": null, "product": "Tavo kettle"}'
FIELDS = {"field/category", "field/order", "field/product"}


def first_letter(prediction: str, reference: str) -> dict[str, float]:
    return {"first": float(prediction[:1] == reference[:1])}


def test_exact_match_ignores_white_space_around_the_text() -> None:
    assert exact_match(" yes\n", "yes") == {"exact_match": 1.0}
    assert exact_match("Yes", "yes") == {"exact_match": 0.0}


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_gives_the_reference_full_marks(name: str) -> None:
    assert set(SCORERS[name](REFERENCE, REFERENCE).values()) == {1.0}


@pytest.mark.parametrize(
    ("prediction", "wrong"),
    [
        ('{"product":"Tavo kettle","order":null,"category":"refund"}', set()),
        (REFERENCE.replace("refund", "defect"), {"field/category", "exact_match"}),
        (REFERENCE.replace('"order": null, ', ""), {"field/order", "exact_match"}),
        (REFERENCE.replace("null", "0"), {"field/order", "exact_match"}),
        (REFERENCE.replace("}", ', "mood": "sad"}'), {"exact_match"}),
    ],
)
def test_a_wrong_field_costs_that_field_and_the_exact_match(
    prediction: str, wrong: set[str]
) -> None:
    assert {
        name for name, score in json_fields(prediction, REFERENCE).items() if score == 0.0
    } == wrong


def test_true_is_not_one() -> None:
    assert json_fields('{"paid": 1}', '{"paid": true}')["field/paid"] == 0.0


@pytest.mark.parametrize("prediction", ["", "refund", "{", "[1]", REFERENCE + "}", "[" * 100_000])
def test_a_prediction_that_is_no_json_object_scores_zero(prediction: str) -> None:
    scores = json_fields(prediction, REFERENCE)
    assert scores == dict.fromkeys(FIELDS | {"valid_json", "exact_match"}, 0.0)


def test_a_broken_reference_is_an_error_of_the_data() -> None:
    with pytest.raises(ValueError):
        json_fields(REFERENCE, "refund")


@pytest.mark.parametrize("separator", [":", "."])
def test_resolve_imports_a_function_of_the_user(separator: str) -> None:
    assert resolve(f"{__name__}{separator}first_letter")("a", "ab") == {"first": 1.0}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("exact", "exact_match, json_fields"),
        ("no_such_package.scores:f", "cannot import 'no_such_package.scores'"),
        ("json.decoder.NAN", "'json.decoder' has no function 'NAN'"),
        ("tests.broken_scorer:f", "importing 'tests.broken_scorer' fails: ZeroDivisionError: "),
        ("olora_ray/train/scoring.py:f", "cannot import 'olora_ray/train/scoring.py'"),
    ],
)
def test_resolve_says_what_is_wrong(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        resolve(name)


def test_a_scorer_that_fails_or_gives_no_numbers_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, object] = {
        "7": 7, "{1: 2}": {1: 2}, "{'a': 'b'}": {"a": "b"}, "None": None, "{'': 1}": {"": 1}, "[1": [1],
        "1000": {"a": 10**400},
    }  # fmt: skip
    for text, value in given.items():
        monkeypatch.setitem(SCORERS, "mine", lambda *_, value=value: value)  # type: ignore[misc]
        with refused("evaluation.scorer: mine must return {name: number}") as caught:
            Judge("mine")("a", "b")
        assert text in str(caught.value)
    monkeypatch.setitem(SCORERS, "mine", lambda *_: {}["missing"])
    with refused("mine fails on the answer 'a' and the reference 'b': KeyError: 'missing'"):
        Judge("mine")("a", "b")
    monkeypatch.setitem(SCORERS, "mine", lambda *_: {"a": True})
    assert Judge("mine")("a", "b") == {"a": 1.0}


@pytest.mark.parametrize("name", ["loss", "perplexity"])
def test_a_score_that_is_called_as_the_held_out_loss_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate and evaluate.py once showed and compared the loss instead."""
    monkeypatch.setitem(SCORERS, "mine", lambda *_: {"same": 1.0, name: 0.5})
    with refused(f"mine returns a score '{name}', but eval/{name} is a metric"):
        Judge("mine")("a", "b")


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan")])
def test_a_score_that_is_not_finite_is_refused_with_its_answer(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        SCORERS,
        "mine",
        lambda prediction, _: {"whole": 1.0, "part": value if not prediction else 0.5},
    )
    assert Judge("mine")("a", "b") == {"whole": 1.0, "part": 0.5}
    told = f"evaluation.scorer: mine returns {float(value)} as 'part' for the answer '' and"
    with refused(told):
        Judge("mine")("", "b")


def longest(rows: Sequence[Row]) -> dict[str, float]:
    return {"longest": max(len(row["answer"]) for row in rows)}


def answered(wanted: Sequence[str], given: Sequence[str]) -> list[Row]:
    return [
        {"prompt": "", "reference": reference, "answer": answer}
        for reference, answer in zip(wanted, given, strict=True)
    ]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1))
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    wanted, answers = zip(*pairs, strict=True)
    found = Judge("macro_f1").over_all(answered(wanted, answers))
    labels = sorted(set(wanted))
    expected = f1_score(wanted, answers, labels=labels, average="macro", zero_division=0)
    assert found == {"macro_f1": pytest.approx(expected)}


def test_a_scorer_with_one_parameter_gets_all_answers() -> None:
    rows = answered(["yes", "no"], ["yes", "perhaps"])
    judge = Judge(f"{__name__}:longest")
    assert (judge("a", "a"), judge.over_all(rows)) == ({"exact_match": 1.0}, {"longest": 7.0})
    both = Judge(f"json_fields,macro_f1, {__name__}:longest")
    assert both("{}", "{}") == {"valid_json": 1.0, "exact_match": 1.0}
    assert both.over_all(rows) == {"macro_f1": 0.5, "longest": 7.0}
    with refused(f"{__name__}:longest"):
        judge.over_all([{}])
    assert judge.over_all([]) == {}


def test_a_mean_is_over_the_answers_that_have_the_score() -> None:
    rows = [{"a": 1.0}, {"a": 0.0, "b": 0.5}, {"a": 0.5}]
    assert means(rows) == {"a": 0.5, "b": 0.5}
    with said() as lines:
        Judge("exact_match").tell_partial(rows)
    assert lines == ["score b: only 1 of 3 answers have it, and its mean is over these"]
    assert means([]) == {}
