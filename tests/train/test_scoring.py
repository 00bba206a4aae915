import json
import math
from pathlib import Path

import numpy as np
import pytest

from olora_ray.common.errors import UserError
from olora_ray.train.scoring import SCORERS, Baseline, Judge, exact_match, json_fields, means, partial_scores, resolve

REFERENCE = '{"category": "refund", "order": null, "product": "Tavo kettle"}'
FIELDS = {"field/category", "field/order", "field/product"}


def first_letter(prediction: str, reference: str) -> dict[str, float]:
    return {"first": float(prediction[:1] == reference[:1])}


@pytest.mark.parametrize(
    ("prediction", "zero"),
    [
        (REFERENCE, set()),
        (json.dumps(dict(reversed(json.loads(REFERENCE).items())), indent=2), set()),
        (REFERENCE.replace("refund", "defect"), {"field/category", "exact_match"}),
        ('{"category": "refund", "product": "Tavo kettle"}', {"field/order", "exact_match"}),  # not there is not null
        (REFERENCE.replace("}", ', "mood": "sad"}'), {"exact_match"}),
        (REFERENCE.replace("null", "0"), {"field/order", "exact_match"}),
    ],
)
def test_scores_of_json(prediction: str, zero: set[str]) -> None:
    scores = json_fields(prediction, REFERENCE)
    assert scores == {name: float(name not in zero) for name in FIELDS | {"valid_json", "exact_match"}}
    assert json_fields('{"paid": 1}', '{"paid": true}')["field/paid"] == 0.0


def test_exact_match_ignores_white_space_around_the_text() -> None:
    assert resolve("exact_match")(" yes\n", "yes") == {"exact_match": 1.0}
    assert exact_match("Yes", "yes") == {"exact_match": 0.0}


@pytest.mark.parametrize("prediction", ["", "refund", "{", "[1]", "null", '"text"', REFERENCE + "}", "[" * 100_000])
def test_a_prediction_that_is_no_json_object_scores_zero(prediction: str) -> None:
    scores = json_fields(prediction, REFERENCE)
    assert scores == dict.fromkeys(FIELDS | {"valid_json", "exact_match"}, 0.0)


def test_a_broken_reference_is_an_error_of_the_data() -> None:
    with pytest.raises(ValueError, match="reference"):
        json_fields(REFERENCE, "refund")


@pytest.mark.parametrize("separator", [":", "."])
def test_resolve_imports_a_function_of_the_user(separator: str) -> None:
    assert resolve(f"{__name__}{separator}first_letter")("a", "ab") == {"first": 1.0}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("exact", "exact_match, json_fields"),
        ("no_such_package.scores:f", "cannot import 'no_such_package.scores'"),
        ("json:no_such_function", "'json' has no function 'no_such_function'"),
        (".relative.module:f", "cannot import"),
        ("tests.broken_scorer:f", "importing 'tests.broken_scorer' fails: ZeroDivisionError: "),
    ],
)
def test_resolve_says_what_is_wrong(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        resolve(name)


def test_a_scorer_that_fails_or_gives_no_numbers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = [7, {1: 2}, {"a": "b"}, None, {"": 1}, [1], {"a": 10**400}]
    for value in given:
        monkeypatch.setitem(SCORERS, "mine", lambda *_, value=value: value)
        with pytest.raises(UserError, match=r"^evaluation\.scorer: mine must give {name: number}, not .*"):
            Judge("mine")("a", "b")
    monkeypatch.setitem(SCORERS, "mine", lambda *_: dict[str, float]()["missing"])
    with pytest.raises(UserError, match=r"mine fails on the answer 'a' to the reference 'b': KeyError: 'missing'"):
        Judge("mine")("a", "b")
    monkeypatch.setitem(SCORERS, "mine", lambda *_: {"a": True})
    assert Judge("mine")("a", "b") == {"a": 1.0}


@pytest.mark.parametrize("name", ["loss", "perplexity"])
def test_a_score_that_is_called_as_the_held_out_loss_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate and evaluate.py showed, and compared, the loss in its place."""
    monkeypatch.setitem(SCORERS, "mine", lambda *_: {"same": 1.0, name: 0.5})
    with pytest.raises(
        UserError, match=rf"mine gives a score called '{name}', but eval/{name} is that of the held-out"
    ):
        Judge("mine")("a", "b")


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan")])
def test_a_score_that_is_not_finite_is_refused_with_its_answer(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "mine", lambda prediction, _: {"whole": 1.0, "part": value if not prediction else 0.5})
    assert Judge("mine")("a", "b") == {"whole": 1.0, "part": 0.5}
    with pytest.raises(UserError, match=rf"mine gives {float(value)} as 'part' for the answer '' to the reference 'b'"):
        Judge("mine")("", "b")


def test_a_mean_is_over_the_answers_that_have_the_score() -> None:
    rows = [{"a": 1.0}, {"a": 0.0, "b": 0.5}, {"a": 0.5}]
    assert means(rows) == {"a": 0.5, "b": 0.5}
    assert partial_scores(rows) == ["score b: 1 of 3 answers have it, its mean is over these"]
    assert (means([]), partial_scores([])) == ({}, [])


RUN = {"base model": "b", "adapter": "a"}


def test_it_comes_back_exactly(tmp_path: Path) -> None:
    place = str(tmp_path / "baseline.json")
    assert Baseline.read(place, RUN, 2) is None
    kept = Baseline(1 / 3, [[1, 2], []])
    kept.write(place, RUN)
    assert Baseline.read(place, RUN, 2) == kept
    assert Baseline.read(place, RUN | {"adapter": "other"}, 2) is None
    assert Baseline.read(place, RUN, 3) is None
    Baseline(None, None).write(place, RUN)  # without rows and questions
    assert Baseline.read(place, RUN, 0) == Baseline(None, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"identity": {"base model": "b", "adapter": "a"}}',
        '{"identity": {"base model": "b", "adapter": "a"}, "loss": 1, "answers": [[1e999]]}',
        '{"identity": {"base model": "b", "adapter": "a"}, "loss": NaN, "answers": [[1]]}',
    ],
)
def test_a_damaged_one_is_measured_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "baseline.json").write_text(text)
    assert Baseline.read(str(tmp_path / "baseline.json"), RUN, 1 if "answers" in text else 0) is None


def test_a_storage_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Baseline(1.0, None).write(str(tmp_path / "file" / "baseline.json"), RUN)
