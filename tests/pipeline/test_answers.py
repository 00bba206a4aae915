"""Answers and their scores: references are scored before training, and a score need not be there for every row."""

from typing import Any

import pytest

from olora_ray.pipeline import answers
from olora_ray.pipeline.answers import Sample
from olora_ray.train import scoring
from tests import tiny
from tests.refused import refused
from tests.said import said


class Tokenizer:
    """Ids as text."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def check(**changes: Any) -> str:
    """The warnings of a check against a small store."""
    with said() as lines:
        answers.check_answers(tiny.config(**changes), tiny.store(3), Tokenizer())  # type: ignore[arg-type]
    return "".join(lines)


def test_a_reference_that_the_scorer_cannot_score_is_named_with_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with refused("rows.jsonl:0"):
        check(evaluation__scorer="json_fields")
    seen: list[str] = []

    def fourth(prediction: str, reference: str) -> dict[str, float]:
        seen.append(reference)
        if len(seen) == 5:
            raise ZeroDivisionError("by chance")
        return {"a": 1.0}

    monkeypatch.setitem(scoring.SCORERS, "fourth", fourth)
    with refused("rows.jsonl:11"):
        check(evaluation__scorer="fourth")


def test_a_scorer_with_nothing_to_score_is_told() -> None:
    with said() as lines:
        text: Any = tiny.ListStore(
            [tiny.pack(8, prompt=1)]
        )  # all but its first token is supervised
        answers.check_answers(tiny.config(evaluation__scorer="exact_match"), text, Tokenizer())
    assert (
        "evaluation.scorer: no answers are scored, because no held-out row has a question"
        in "".join(lines)
    )


def test_references_that_no_answer_can_be_as_long_as_are_told() -> None:
    store: Any = tiny.ListStore([tiny.pack(9, 7), tiny.pack(14)])  # after prompts of 3 tokens
    for most, told in ((10, None), (9, "1 of 3 references"), (4, "2 of 3 references")):
        config = tiny.config(evaluation__scorer="exact_match", evaluation__max_new_tokens=most)
        with said() as lines:
            answers.check_answers(config, store, Tokenizer())
        text = "".join(lines)
        assert text == "" if told is None else f"max_new_tokens={most}: {told} " in text
        assert told is None or text.endswith("set it to 11")


def test_the_mean_of_a_score_is_over_the_rows_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        scoring.SCORERS,
        "some",
        lambda found, wanted: {"all": 1.0} | ({"yes": float(found == "y")} if found else {}),
    )
    samples = [Sample("", "y", "y", "y"), Sample("", "y", "", "n"), Sample("", "y", "", "")]
    with said() as lines:
        found = scores(samples, "some")
    assert found == {"before": {"all": 1.0, "yes": 1.0}, "after": {"all": 1.0, "yes": 0.5}}
    assert "2 of 3 answers" in "".join(lines)
    assert scores(samples, None) == {}


def scores(samples: list[Sample], scorer: str | None) -> answers.Scores:
    config = tiny.config(evaluation__scorer=scorer)
    return answers.means(config, samples, answers.judged(config, samples))


def test_macro_f1_stands_beside_the_scores_per_answer() -> None:
    samples = [Sample("", label, "b", "b") for label in ("a", "b", "b", "b")]
    after = {"exact_match": 0.75, "macro_f1": pytest.approx(3 / 7)}
    assert scores(samples, "macro_f1")["after"] == after
    assert scores(samples, "exact_match, macro_f1")["after"] == after
    check(evaluation__scorer="macro_f1", gate__metric="eval/macro_f1")
    with refused("gate: eval/macro_f1"):
        check(evaluation__scorer="exact_match", gate__metric="eval/macro_f1")
