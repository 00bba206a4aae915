"""The self-test of a group of workers: what fails on one of them ends all, with its line."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from olora_ray.cluster import start
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.start import StartingPoint, self_tested
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel
from olora_ray.tokens.plan import CHOSEN, REJECTED
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loss import SelfTest, SupervisedLoss
from tests import tiny
from tests.crew import Crews
from tests.families import zoo
from tests.families.variants import ALL
from tests.refused import refused
from tests.said import said

CONTEXT: Any = SimpleNamespace(
    activate=lambda adapted: contextlib.nullcontext(), device=torch.device("cpu")
)


def spec_of(config: Config, digest: str = "") -> TrainSpec:
    store = tiny.store(3)
    return TrainSpec(config, BaseModel("tiny", "", digest), "digest", (0,), store, None)


def _tested(wrong: int | None) -> tuple[str, list[int]]:
    """The attention that all take; on worker `wrong` an adapter does not start where the base is."""
    settings = tiny.decided(cluster__workers=2)
    trainer = tiny.trainer(settings)
    if dist.get_rank() == wrong:
        trainer.flat.vector[3] = 0.5
    start = StartingPoint(trainer, "segments", TrainState(), None, resumed=False)
    found = self_tested(CONTEXT, spec_of(settings), start)
    return found.attention, collectives.gather(dist.get_rank())


def test_all_workers_pass_together(crew: Crews) -> None:
    assert crew(2).run(_tested, None) == [("segments", [0, 1])] * 2


def test_what_fails_on_one_worker_ends_all_with_its_line(crew: Crews) -> None:
    for wrong in (0, 1):
        errors = crew(2).run(_tested, wrong)
        assert [type(error) for error in errors] == [UserError, UserError]
        assert "untrained adapters change the loss" in str(errors[0])
        assert str(errors[0]) == str(errors[1])
    assert crew(2).run(collectives.rank) == [0, 1], "nobody waits for another"


def _resumed(state: TrainState, digest: str = "", **settings: Any) -> tuple[StartingPoint, bool]:
    """A worker that resumes with this state, as a checkpoint keeps it; and whether it tests its model.

    What is found of a base without a digest is not kept on the node.
    """
    config = tiny.decided(**settings)
    state = TrainState(**json.loads(json.dumps(asdict(state))))
    start = StartingPoint(
        tiny.trainer(config), "eager", state, None, resumed=state.self_test is not None
    )
    with said() as lines:
        found = self_tested(CONTEXT, spec_of(config, digest), start)
    return found, not any("self-test: passed earlier" in line for line in lines)


def test_what_has_passed_is_not_tested_again_by_a_worker_that_resumes() -> None:
    first, done = _resumed(TrainState())
    assert done
    again, done = _resumed(first.state)
    assert not done
    before, after = first.trainer.loss, again.trainer.loss
    assert again.attention == first.attention == "segments"
    model = after.model
    assert model.config._attn_implementation == "segments", (
        "and not the one that it was loaded with"
    )
    assert after.tested == before.tested
    assert after.given_masks == before.given_masks
    assert not any(layer.training for layer in again.trainer.adapted.values())


@pytest.mark.parametrize("what", ["processor", "torch", "code"])
def test_another_worker_or_version_tests_again(what: str) -> None:
    first, _ = _resumed(TrainState())
    first.state.self_test["with"][what] = "another"
    again, done = _resumed(first.state)
    assert done
    assert again.state.self_test["with"][what] != "another"


def test_a_run_with_pairs_keeps_the_layout_in_which_it_began() -> None:
    config = tiny.decided(train__objective="pairs")
    pairs = tiny.ListStore([replace(tiny.pack(9, 9), roles=(CHOSEN, REJECTED))])
    spec = replace(spec_of(config), train=pairs)

    def layout(state: TrainState, resumed: bool) -> str:
        start = StartingPoint(tiny.trainer(config), "eager", state, None, resumed=resumed)
        return self_tested(CONTEXT, spec, start).attention

    state = TrainState()
    assert layout(state, resumed=False) == "segments, prompt once"
    assert layout(state, resumed=True) == "segments, prompt once"
    noted: Any = state.self_test
    noted["with"]["code"] = "another"
    noted["found"]["once"] = False
    assert layout(state, resumed=True) == "segments"


def _partly_unused(change: Callable[[Any], Any], **settings: Any) -> StartingPoint:
    """A start with a first MLP that `change` makes of it."""
    model = tiny.llama(attention="segments")
    model.model.layers[0].mlp.forward = change(model.model.layers[0].mlp)
    config = tiny.decided(**settings)
    start = StartingPoint(
        tiny.trainer(config, model=model), "segments", TrainState(), None, resumed=False
    )
    return self_tested(CONTEXT, spec_of(config, "base"), start)


def _without_gate(mlp: Any) -> Any:
    return lambda x: mlp.down_proj(mlp.up_proj(x))


def test_all_linear_leaves_out_what_no_gradient_reaches(node: Path) -> None:
    for _ in range(2):  # the second time with what the node has kept
        with said() as lines:
            start = _partly_unused(_without_gate)
        assert len(start.trainer.adapted) == 13
        assert "model.layers.0.mlp.gate_proj" not in start.trainer.adapted
        assert not hasattr(
            start.trainer.loss.model.get_submodule("model.layers.0.mlp.gate_proj"), "da"
        )
        assert (
            len([line for line in lines if "all-linear leaves out 1 layer: no gradient" in line])
            == 1
        )
    with refused("no gradient reaches"):
        _partly_unused(_without_gate, adapter__targets=("gate_proj", "up_proj"))


def test_a_block_that_begins_as_zeros_is_adapted() -> None:
    def begins_as_zeros(mlp: Any) -> Any:
        mlp.down_proj.weight.zero_()
        return mlp.forward

    for targets in ("all-linear", ("gate_proj", "down_proj")):
        start = _partly_unused(begins_as_zeros, adapter__targets=targets, adapter__method="lora")
        assert {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"} <= set(
            start.trainer.adapted
        )


def test_the_node_keeps_what_has_passed_for_the_next_run(node: Path) -> None:
    first, done = _resumed(TrainState(), "base")
    assert done
    again, done = _resumed(TrainState(), "base")
    assert not done
    assert again.attention == first.attention
    assert again.trainer.loss.tested == first.trainer.loss.tested
    assert again.state.self_test == first.state.self_test, (
        "another node that resumes the run need not test it either"
    )
    assert _resumed(TrainState(), "another base")[1]
    assert _resumed(TrainState(), "base", adapter__rank=2)[1]
    assert _resumed(TrainState(), "base", model__attention="sdpa")[1]
    for _ in range(2):  # its code may lie elsewhere, and change there
        assert _resumed(TrainState(), "base", model__trust_remote_code=True)[1]
    assert not _resumed(TrainState(), "base")[1]


def test_a_base_that_has_passed_for_one_trial_is_looked_at_for_the_next() -> None:
    def again(loss: SupervisedLoss, **settings: Any) -> SelfTest:
        return start.self_test(loss, spec_of(tiny.decided(**settings)), [], CONTEXT.device)

    neighbours = SupervisedLoss(tiny.of_kind("phi3", tiny.LONG_ROPE))
    neighbours.tested = SelfTest("segments")
    wide: dict[str, Any] = {"data__max_length": 128, "data__packing": False}
    assert again(neighbours, **wide, train__micro_batch=1) == neighbours.tested
    with refused("data.max_length=128"):
        again(neighbours, **wide, train__micro_batch=2)

    variant = ALL["llama4_text"]
    places = SupervisedLoss(
        zoo.make(replace(variant, sizes=variant.sizes | {"floor_scale": 64}), attention="sdpa")
    )
    places.tested = SelfTest("segments")
    assert again(places, data__max_length=48, train__micro_batch=1) == places.tested
    with refused("train.micro_batch=2"):
        again(places, data__max_length=48, train__micro_batch=2)
