"""What result.json says is of the adapter that is exported."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import publish
from olora_ray.train.checkpoint import TrainState, perplexity
from tests import tiny


def test_loss_and_perplexity_are_those_of_the_best_step() -> None:
    losses = {0: 2.0, 2: 1.0, 4: 1.5}
    history = [
        {"step": float(step), "eval/loss": loss, "eval/perplexity": perplexity(loss)} for step, loss in losses.items()
    ]
    store: Any = tiny.store(3)
    spec = TrainSpec(tiny.config(), BaseModel("tiny", "", ""), "digest", (0,), store, store)
    tracker: Any = SimpleNamespace(uri="sqlite:///mlflow.db", run_id="cafe", text=lambda *_: None, url=lambda: None)
    result = TrainResult(state=TrainState(4, 1.0, 2, history=history))
    found = publish.finish(spec, tracker, result, {}, {}, None).result
    assert found["best_step"] == 2
    assert found["eval_loss_before"] == 2.0
    assert found["metrics"]["eval/loss"] == 1.0
    assert found["metrics"]["eval/perplexity"] == pytest.approx(math.e)
