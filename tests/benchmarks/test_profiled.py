"""Operations of a training are counted for the part of the model that they are for, backwards too."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from olora_ray.tokens.collate import collate
from olora_ray.train.loader import Schedule, StepLoader
from tests import tiny


def test_the_operations_of_a_step_are_told_apart(benchmark: Any) -> None:
    module = benchmark("profiled")
    trainer = tiny.trainer(tiny.config(), model=tiny.llama(attention="segments", dtype=torch.bfloat16))
    module.mark(trainer)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        trainer.loss(collate([tiny.pack(9, 7, 12)], "segments")).backward()
        trainer.optimizer.step(0.1)
    events = list(found.events())
    made_in = module.parts_of_nodes(events)
    of: dict[str, set[str]] = {}
    for event in events:
        of.setdefault(event.name, set()).add(module.category(event, made_in))
    assert of["_RMSNorm"] == of["_RMSNormBackward"] == {"norms"}
    assert of["_Adapted"] == of["_AdaptedBackward"] == {"low-rank elementwise"}
    assert of["_Batched"] == of["_BatchedBackward"] == {"attention"}
    assert of["aten::silu"] == of["SiluBackward0"] == {"activation functions"}
    assert of["aten::_log_softmax"] == {"head and loss"}
    assert of["aten::_fused_adamw_" if "aten::_fused_adamw_" in of else "aten::lerp_"] <= {"optimizer"}
    assert {"matrix products", "head and loss"} <= of["aten::mm"]
    assert of["aten::addmm_"] == {"matrix products"}


def test_the_seconds_of_a_pass_are_shared_out_whole(benchmark: Any) -> None:
    module, store = benchmark("profiled"), tiny.store()
    settings = tiny.config(train__steps=2)
    trainer = tiny.trainer(settings)
    loader = StepLoader(store, settings.train, 0, "segments")
    taken, seconds = module.where(trainer, lambda: trainer.steps(loader, 0, Schedule(settings.train, store)))
    assert tuple(taken) == module.CATEGORIES
    assert sum(taken.values()) == pytest.approx(seconds, rel=0.2)
    assert all(taken[name] > 0 for name in module.CATEGORIES)
