"""The gate: insensitive to noise unless configured otherwise, and clear about its reasons."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.common.errors import UserError
from olora_ray.config.nights import Gate
from olora_ray.evaluation.rows import RowResults
from olora_ray.retrain.gate import HeldOut, decide
from tests.refused import refused

LOSSES = st.lists(st.floats(0.01, 8.0), min_size=2, max_size=12)


def results(losses: Any, tokens: int = 1, data: str = "rows", **scores: Any) -> RowResults:
    return RowResults(
        data,
        (tokens,) * len(losses),
        tuple(map(float, losses)),
        {name: dict(enumerate(map(float, values))) for name, values in scores.items()},
        tuple((0, row) for row in range(len(losses))),
    )


def gate(**fields: Any) -> Gate:
    """Return a gate that accepts few rows."""
    return Gate.model_validate({"min_rows": 2, **fields})


def lax(**fields: Any) -> Gate:
    """Return a gate that decides by the mean improvement alone."""
    return gate(**{"confident": False, "anchor": 1e6, **fields})


@given(LOSSES)
def test_the_same_model_never_passes_unless_it_may_be_worse(losses: list[float]) -> None:
    same = results(losses, score=losses)
    for metric in ("eval/loss", "eval/perplexity", "eval/score"):
        assert not decide(gate(metric=metric), same, same).passed
        assert decide(gate(metric=metric, must_improve_by=-1e-6, anchor=1e-5), same, same).passed
        assert not decide(lax(metric=metric), same, same).passed
        assert decide(lax(metric=metric, must_improve_by=-1e-6), same, same).passed


def test_losses_count_downwards_and_scores_upwards() -> None:
    good, bad = results([1.0, 1.2], match=[1.0, 1.0]), results([2.0, 2.4], match=[0.0, 1.0])
    for metric in ("eval/loss", "eval/perplexity", "eval/match"):
        assert decide(lax(metric=metric), good, bad).passed, metric
        refused = decide(lax(metric=metric), bad, good)
        assert not refused.passed, metric
        worse = -refused.details["improvement"]["mean"]
        assert f": worse by {worse:.4f} (99.75% interval of the" in refused.reason
    assert good.gain(bad, "eval/loss").interval.mean == pytest.approx(1.1)
    assert good.gain(bad, "eval/match").interval.mean == pytest.approx(0.5)


def test_a_score_of_all_answers_decides_if_the_gate_names_it() -> None:
    def answering(right: int) -> RowResults:
        answers = {
            row: {"prompt": "", "reference": "ab"[row % 2], "answer": "ab"[row % 2 and row < right]}
            for row in range(40)
        }
        return replace(results([1.0] * 40), answers=answers, scorer="macro_f1")

    named = gate(metric="eval/macro_f1", **{"and": [{"metric": "eval/macro_f1", "at_least": 0.5}]})
    passed = decide(named, answering(40), answering(10))
    assert passed.passed
    assert passed.details["challenger"]["eval/macro_f1"] == 1.0
    assert not decide(named, answering(10), answering(10)).passed
    unseen = HeldOut(unseen=range(20))
    assert decide(named, answering(20), answering(0), unseen).details["groups"] == 20
    with refused("eval/macro_f1"):
        decide(named, answering(20), results([1.0] * 40))


def test_noise_passes_as_a_point_but_not_with_confidence() -> None:
    rng = np.random.default_rng(1)
    champion = rng.normal(2.0, 0.5, 80)
    noisy = champion + rng.normal(0.0, 0.2, 80)
    noisy -= noisy.mean() - champion.mean() + 0.001  # better by a hair
    better = champion - 0.1 + rng.normal(0.0, 0.05, 80)
    assert decide(lax(), results(noisy), results(champion)).passed
    doubtful = decide(Gate(), results(noisy), results(champion))
    assert not doubtful.passed
    assert "the interval must begin above 0" in doubtful.reason
    assert decide(Gate(), results(better), results(champion)).passed


def test_all_conditions_must_hold() -> None:
    conditions = [
        {"metric": "eval/match", "at_least": 0.9},
        {"metric": "eval/perplexity", "at_most": 3.0},
    ]
    strict, champion = gate(**{"and": conditions}), results([3.0, 3.002])
    assert decide(strict, results([1.0, 1.0], match=[1.0, 1.0]), champion).passed
    low = decide(strict, results([1.0, 1.0], match=[1.0, 0.0]), champion)
    assert (low.passed, low.reason) == (False, "eval/match 0.5000 is below 0.9")
    assert decide(strict, results([1.0], match=[0.9]), None).passed, "the bound itself passes"
    assert not decide(strict, results([9.0], match=[1.0]), None).passed
    assert decide(gate(must_improve_by=5.0), results([9.0]), None).passed, "there is no champion"


def test_what_is_not_a_number_passes_nothing() -> None:
    broken, good = results([math.nan, 1.0], s=[math.nan, 1]), results([1.0, 1.0], s=[0, 0])
    for metric in ("eval/loss", "eval/s"):
        assert not decide(lax(metric=metric), broken, good).passed
        assert not decide(gate(metric=metric), broken, good).passed
    assert not decide(
        gate(**{"and": [{"metric": "eval/loss", "at_most": 9.0}]}), broken, None
    ).passed


def test_a_metric_or_rows_that_were_not_measured() -> None:
    with refused("eval/match"):
        decide(gate(metric="eval/match"), results([1.0]), results([1.0]))
    with pytest.raises(UserError):
        decide(gate(), results([1.0]), results([1.0], data="others"))


def test_few_rows_or_groups_are_not_enough() -> None:
    champion, better = results([2.0] * 19), results([1.0] * 19)
    for default in (Gate(), Gate(confident=False, anchor=9.0)):
        few = decide(default, better, champion)
        assert not few.passed
        assert "19 rows), but gate.min_rows=20 needs more" in few.reason
    many = [results(np.linspace(low, low + 1, 60)) for low in (1.0, 2.0)]
    assert decide(Gate(), *many).passed
    alike = decide(Gate(), *many, HeldOut(groups=[row // 4 for row in range(60)]))
    assert not alike.passed
    assert "60 rows in 15 groups), but gate.min_rows=20" in alike.reason
    assert decide(Gate(), *many, HeldOut(groups=[row // 3 for row in range(60)])).passed


def test_rows_that_the_champion_was_trained_on_are_left_out() -> None:
    champion = results([0.01] * 40 + [2.0, 2.2] * 15)  # it has memorised the first forty rows
    better = results([1.0, 1.1] * 20 + [1.0, 1.1] * 15)
    assert not decide(Gate(), better, champion).passed
    fair = decide(Gate(), better, champion, HeldOut(unseen=list(range(40, 70))))
    assert fair.passed
    assert "30 rows) (left out: 40 that the champion may have been trained on)" in fair.reason
    assert not decide(Gate(), better, champion, HeldOut(unseen=list(range(60, 70)))).passed
    none = decide(Gate(), better, champion, HeldOut(unseen=[]))
    assert none.reason.startswith("eval/loss: no held-out row is left to compare on")


def test_answers_to_rows_that_the_champion_was_trained_on_alone_are_a_refusal() -> None:
    """Regression: the first file has changed and all answers are to its rows. Each night trained, then failed."""
    better, champion = (results([1.0] * 70, first=[score] * 40) for score in (1.0, 0.0))
    found = decide(Gate(metric="eval/first"), better, champion, HeldOut(unseen=list(range(40, 70))))
    assert not found.passed
    assert found.reason.startswith("eval/first: no held-out row among the answered rows")
    some = decide(Gate(metric="eval/first"), better, champion, HeldOut(unseen=list(range(20, 70))))
    assert some.passed


def test_scores_are_paired_by_row_whatever_rows_have_them() -> None:
    """Lists of scores would be paired with other rows, or have different lengths."""

    def scored(found: dict[int, float]) -> RowResults:
        plain = results([1.0] * 6)
        return RowResults(plain.data, plain.tokens, plain.losses, {"first": found}, plain.origins)

    ours, theirs = scored({0: 1.0, 1: 0.0, 2: 1.0}), scored({1: 0.0, 2: 1.0, 5: 0.0})
    found = ours.gain(theirs, "eval/first")
    assert (found.rows, found.interval.mean, found.interval.high) == (2, 0.0, 0.0), (
        "the same on the rows of both"
    )
    assert (ours.metric("eval/first"), theirs.metric("eval/first")) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )
    with pytest.raises(UserError):
        decide(gate(metric="eval/first"), scored({0: 1.0}), scored({1: 1.0}))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_champion_whose_loss_is_not_finite_blocks_nobody(broken: float) -> None:
    champion, good = [broken, *np.linspace(1.0, 2.0, 40)], np.linspace(0.9, 1.9, 41)
    for metric in ("eval/loss", "eval/perplexity"):
        better = decide(Gate(metric=metric), results(good), results(champion))
        assert better.passed
        assert "40 rows) (left out: the champion's loss is not finite on 1 row)" in better.reason
        assert not decide(Gate(metric=metric), results(np.add(good, 2.0)), results(champion)).passed
        as_broken = decide(Gate(metric=metric), results([broken, *good[1:]]), results(champion))
        assert not as_broken.passed, "a challenger's own loss must be finite"
        lost = decide(Gate(metric=metric), results(good), results([broken] * 41))
        assert (lost.passed, lost.details["groups"]) == (True, 0)
    strict = Gate.model_validate({"and": [{"metric": "eval/loss", "at_most": 1.0}]})
    assert not decide(strict, results(good), results([broken] * 41)).passed


def test_whoever_answers_only_what_is_easy_does_not_win() -> None:
    """Regression: a scorer left out unreadable answers, and only the few other rows were compared."""
    champion, challenger = (
        results([1.0] * 200, acc=[1.0] * 150 + [0.0] * 50),
        results([1.0] * 200, acc=[1.0] * 200),
    )
    assert decide(gate(metric="eval/acc"), challenger, champion).passed
    few = replace(challenger, scores={"acc": dict.fromkeys(range(0, 200, 4), 1.0)})
    decision = decide(gate(metric="eval/acc"), few, champion)
    assert not decision.passed
    assert (
        "(no score, counted as 0: 150 rows of the challenger, 0 of the champion)" in decision.reason
    )
    both = replace(
        champion, scores={"acc": {row: champion.scores["acc"][row] for row in few.scores["acc"]}}
    )
    assert decide(gate(metric="eval/acc"), few, both).passed


def test_preference_pairs_are_judged_by_their_loss_and_by_what_they_do_to_the_chosen_answers() -> (
    None
):
    """The first twenty rows are pairs, the others have one answer."""

    def of(pairs: float, chosen: float, others: float) -> RowResults:
        plain = results([chosen] * 20 + [others] * 20)
        noise = [0.01 * (row % 3) for row in range(20)]
        scores = {"pairs/loss": dict(enumerate(pairs + each for each in noise))}
        return RowResults(plain.data, plain.tokens, plain.losses, scores, plain.origins)

    champion = of(0.6, 2.0, 3.0)
    by_rows = gate(metric="eval/loss")
    assert decide(gate(min_rows=20), of(0.5, 2.04, 3.04), champion).passed
    assert not decide(gate(min_rows=21), of(0.5, 2.0, 3.0), champion).passed
    for worse, why in (
        (of(0.5, 2.06, 3.0), "chosen answers: eval/loss"),
        (of(0.5, 2.0, 3.06), "other rows: eval/loss"),
    ):
        found = decide(gate(), worse, champion)
        assert not found.passed
        assert found.reason.startswith(why)
        assert decide(gate(chosen_margin=0.1), worse, champion).passed
    found = decide(by_rows, of(0.66, 1.9, 2.8), champion)
    assert not found.passed
    assert found.reason.startswith("pairs: eval/pairs/loss")
