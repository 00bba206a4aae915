"""The result of a training comes back from training.json, or is refused."""

import pytest

from olora_ray.cluster.spec import IN_WINDOWS, AnswerPair, TrainResult, TrainSpec
from olora_ray.common import records
from olora_ray.model.source import BaseModel
from olora_ray.tokens.manifest import Outline
from olora_ray.tokens.store import TokenStore
from olora_ray.train.checkpoint import TrainState, require_same
from tests import tiny
from tests.refused import refused


def test_a_result_comes_back_exactly() -> None:
    state = TrainState(step=7, best_loss=1 / 3, best_step=5, stale=1, before=[[1], []])
    state.record(7, {"train/loss": 0.1 + 0.2})
    result = TrainResult(
        state=state, stopped_early=True, answers=(AnswerPair((1, 2), (3,), (), (4,)),)
    )
    assert records.parsed(records.text_of(result), TrainResult) == result


def test_a_run_that_starts_with_an_adapter_is_another_than_one_that_does_not() -> None:
    none, one, moved, another = (
        tiny.spec(digest, train__start=place).identity()
        for digest, place in ((None, None), ("x", "/a"), ("x", "/moved"), ("y", "/a"))
    )
    assert "start" not in none, "runs from before there was such a setting are resumed"
    assert none != one == moved != another


def test_a_run_that_was_drawn_in_windows_is_not_resumed_in_one_draw() -> None:
    """It would repeat some of its rows and miss others."""
    few, many = (
        TokenStore("/a", Outline("digest", shards, 8, ()), (), None)
        for shards in (IN_WINDOWS, IN_WINDOWS + 1)
    )
    base = BaseModel("m", "/m", "base")
    before, now = (
        TrainSpec(tiny.decided(), base, "tokenizer", (0,), store, None).identity()
        for store in (few, many)
    )
    assert "order" not in before, "the identity of all other stores stays as it was"
    require_same(now, now, "step-5")
    with refused("another order"):
        require_same({**before, "order": "windows"}, now, "step-5")


@pytest.mark.parametrize("method", ["olora", "lora"])
def test_the_identity_of_an_adapter_of_before_is_the_same_text(method: str) -> None:
    """Checkpoints, versions and names of exports hold it: settings of other methods are not in it."""
    found = tiny.spec(
        adapter__method=method, adapter__rank=4, adapter__alpha=8, adapter__sigma=0.5
    ).identity()["adapter"]
    assert found == (
        f'{{"method":"{method}","rank":4,"alpha":8.0,"dropout":0.0,"targets":"all-linear","rank_stabilized":false}}'
    )
    assert tiny.spec(adapter__method=method).factor_origin().keys() == {
        "base model",
        "method",
        "targets",
        "seed",
    }


def test_factors_of_the_data_are_those_of_these_tokens_only() -> None:
    eva = {"adapter__method": "eva"}
    found = tiny.spec(**eva).factor_origin()
    assert found["training data"] == "list"
    assert (found["rho"], found["init_tokens"]) == ("2.0", "1024")
    assert tiny.spec(**eva, adapter__alpha=3).factor_origin() == found
    for other in (
        {"adapter__rho": 1.5},
        {"adapter__init_tokens": 64},
        {"model__dtype": "bfloat16"},
    ):
        assert tiny.spec(**eva, **other).factor_origin() != found


def test_what_the_base_does_is_measured_again_with_another_precision_or_length_of_answers() -> None:
    one, other, longer = (
        tiny.spec(**changes).baseline_identity()
        for changes in ({}, {"model__dtype": "bfloat16"}, {"evaluation__max_new_tokens": 5})
    )
    assert one != other != longer != one
