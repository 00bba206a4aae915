"""The gate: monotone in both models, deaf to noise only where it is told to be, and clear about why."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Gate
from olora_ray.evaluation.rows import RowResults
from olora_ray.retrain.gate import decide, improvement

LOSSES = st.lists(st.floats(0.01, 8.0), min_size=2, max_size=12)


def results(losses: Any, tokens: int = 1, data: str = "rows", **scores: Any) -> RowResults:
    return RowResults(
        data,
        (tokens,) * len(losses),
        tuple(map(float, losses)),
        {name: tuple(values) for name, values in scores.items()},
    )


def gate(**fields: Any) -> Gate:
    return Gate.model_validate(fields)


@given(LOSSES, st.floats(0.0, 2.0), st.floats(0.0, 2.0))
def test_a_better_challenger_never_fails_where_a_worse_one_passes(losses: list[float], a: float, b: float) -> None:
    champion = results(losses)
    better, worse = (decide(gate(), results(np.add(losses, shift - 1.0)), champion) for shift in sorted((a, b)))
    assert better.passed >= worse.passed


@given(LOSSES, LOSSES, st.floats(-1.0, 1.0), st.floats(-1.0, 1.0), st.booleans())
def test_asking_for_more_never_lets_more_through(
    ours: list[float], theirs: list[float], a: float, b: float, confident: bool
) -> None:
    size = min(len(ours), len(theirs))
    pair = results(ours[:size]), results(theirs[:size])
    lax, strict = (decide(gate(must_improve_by=by, confident=confident), *pair) for by in sorted((a, b)))
    assert lax.passed >= strict.passed
    assert (
        decide(gate(must_improve_by=a), *pair).passed >= decide(gate(must_improve_by=a, confident=True), *pair).passed
    )


@given(LOSSES)
def test_the_same_model_passes_unless_it_must_improve(losses: list[float]) -> None:
    same = results(losses, score=losses)
    for metric in ("eval/loss", "eval/perplexity", "eval/score"):
        assert decide(gate(metric=metric), same, same).passed
        assert not decide(gate(metric=metric, must_improve_by=1e-6), same, same).passed


def test_losses_count_downwards_and_scores_upwards() -> None:
    good, bad = results([1.0, 1.2], match=[1.0, 1.0]), results([2.0, 2.4], match=[0.0, 1.0])
    for metric in ("eval/loss", "eval/perplexity", "eval/match"):
        assert decide(gate(metric=metric), good, bad).passed, metric
        refused = decide(gate(metric=metric), bad, good)
        assert not refused.passed, metric
        assert "must improve by 0 at least" in refused.reason
    assert improvement(gate(), good, bad).mean == pytest.approx(1.1)
    assert improvement(gate(metric="eval/match"), good, bad).mean == pytest.approx(0.5)


def test_noise_passes_as_a_point_but_not_with_confidence() -> None:
    rng = np.random.default_rng(1)
    champion = rng.normal(2.0, 0.5, 80)
    noisy = champion + rng.normal(0.0, 0.2, 80)
    noisy -= noisy.mean() - champion.mean() + 0.001  # better by a hair
    better = champion - 0.1 + rng.normal(0.0, 0.05, 80)
    assert decide(gate(), results(noisy), results(champion)).passed
    doubtful = decide(gate(confident=True), results(noisy), results(champion))
    assert not doubtful.passed
    assert "the interval must begin at 0 at least" in doubtful.reason
    assert decide(gate(confident=True), results(better), results(champion)).passed


def test_the_interval_is_of_the_improvement() -> None:
    rng = np.random.default_rng(2)
    champion = rng.normal(2.0, 0.5, 60)
    found = decide(gate(), results(champion - rng.normal(0.3, 0.1, 60)), results(champion)).details["improvement"]
    assert 0.2 < found["low"] < found["mean"] < found["high"] < 0.4


def test_all_conditions_must_hold() -> None:
    conditions = [{"metric": "eval/match", "at_least": 0.9}, {"metric": "eval/perplexity", "at_most": 3.0}]
    strict = gate(**{"and": conditions})
    champion = results([3.0, 3.0])
    assert decide(strict, results([1.0, 1.0], match=[1.0, 1.0]), champion).passed
    low = decide(strict, results([1.0, 1.0], match=[1.0, 0.0]), champion)
    assert (low.passed, low.reason) == (False, "eval/match 0.5000 is below 0.9")
    both = decide(strict, results([2.0, 2.0], match=[0.0, 0.0]), champion)
    assert both.reason == "eval/match 0.0000 is below 0.9; eval/perplexity 7.3891 is above 3"
    assert decide(strict, results([1.0], match=[0.9]), None).passed, "the bound itself passes"


def test_without_a_champion_only_the_conditions_count() -> None:
    first = decide(gate(must_improve_by=5.0, confident=True), results([9.0]), None)
    assert first.passed
    assert "no champion" in first.reason
    condition = [{"metric": "eval/loss", "at_most": 1.0}]
    assert not decide(gate(**{"and": condition}), results([9.0]), None).passed


def test_what_is_not_a_number_passes_nothing() -> None:
    broken, good = results([math.nan, 1.0]), results([1.0, 1.0])
    assert not decide(gate(), broken, good).passed
    assert not decide(gate(**{"and": [{"metric": "eval/loss", "at_most": 9.0}]}), broken, None).passed


def test_a_metric_or_rows_that_were_not_measured() -> None:
    with pytest.raises(UserError, match=r"eval/match: not measured .* eval/loss, eval/perplexity"):
        decide(gate(metric="eval/match"), results([1.0]), results([1.0]))
    with pytest.raises(UserError, match="other held-out tokens"):
        decide(gate(), results([1.0]), results([1.0], data="others"))


def test_the_details_are_json() -> None:
    import json

    found = decide(gate(**{"and": [{"metric": "eval/loss", "at_most": 9.0}]}), results([1.0]), results([2.0]))
    assert json.loads(json.dumps(found.details))["improvement"]["mean"] == pytest.approx(1.0)
