"""The result of a training comes back from training.json, or is refused."""

from typing import Any

import pytest

from olora_ray.cluster.spec import AnswerPair, TrainResult, TrainSpec
from olora_ray.model.source import BaseModel
from olora_ray.train.state import TrainState
from tests import tiny


def test_a_result_comes_back_exactly() -> None:
    state = TrainState(step=7, best_loss=1 / 3, best_step=5, stale=1, before=[[1], []])
    state.record(7, {"train/loss": 0.1 + 0.2})
    result = TrainResult(state=state, stopped_early=True, answers=(AnswerPair((1, 2), (3,), (), (4,)),))
    assert TrainResult.from_json(result.to_json()) == result


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"answers": [], "state": {"stepp": 3}}', '{"answers": 3}']
)
def test_anything_else_is_an_error_that_callers_expect(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        TrainResult.from_json(text)


def test_a_run_that_starts_with_an_adapter_is_another_than_one_that_does_not() -> None:
    store: Any = tiny.store()

    def identity(start: str | None, **changes: Any) -> dict[str, str]:
        base = BaseModel("m", "/m", "base")
        return TrainSpec(tiny.config(**changes), base, "tokenizer", (0,), store, None, start).identity()

    assert "start" not in identity(None), "runs from before there was such a setting are resumed"
    assert identity("digest", train__start="/a") != identity("another", train__start="/a")
    assert identity("digest", train__start="/a") == identity("digest", train__start="/moved")
    assert identity("digest", train__start="/a") != identity(None)


def origin(**changes: Any) -> dict[str, str]:
    store: Any = tiny.store()
    return TrainSpec(
        tiny.config(**changes), BaseModel("m", "/m", "base"), "tokenizer", (0,), store, None
    ).factor_origin()


def test_factors_of_the_data_are_those_of_these_tokens_only() -> None:
    assert origin().keys() == {"base model", "method", "targets", "seed"}, "as kept factors of before have it"
    eva = {"adapter__method": "eva"}
    found = origin(**eva)
    assert found["training data"] == "list"
    assert (found["rho"], found["eva_tokens"]) == ("2.0", "1024")
    assert origin(**eva, adapter__alpha=3) == found
    for other in ({"adapter__rho": 1.5}, {"adapter__eva_tokens": 64}, {"model__dtype": "bfloat16"}):
        assert origin(**eva, **other) != found
