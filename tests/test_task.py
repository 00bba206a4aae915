"""What training gives comes back from training.json, or is refused."""

import pytest

from olora_ray.task import Answered, Outcome
from olora_ray.train.state import TrainState


def test_an_outcome_comes_back_exactly() -> None:
    state = TrainState(step=7, best_loss=1 / 3, best_step=5, stale=1, before=[[1], []])
    state.record(7, {"train/loss": 0.1 + 0.2})
    outcome = Outcome(state=state, stopped_early=True, answers=(Answered((1, 2), (3,), (), (4,)),))
    assert Outcome.from_json(outcome.to_json()) == outcome


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"answers": [], "state": {"stepp": 3}}', '{"answers": 3}']
)
def test_anything_else_is_an_error_that_callers_expect(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Outcome.from_json(text)
