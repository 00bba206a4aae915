"""The first step of Adam: what is predicted of it."""

import math
from typing import Any

import pytest
import torch

from olora_ray.tokens.collate import Batch, collate
from olora_ray.train import first_step
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import watched
from tests import tiny
from tests.said import said


def trainer(method: str, **changes: Any) -> Any:
    model = tiny.llama(attention="segments")
    model.unused = torch.nn.Linear(64, 64)
    return tiny.trainer(tiny.decided(adapter__method=method, **changes), model=model)


def batch(seed: int = 0) -> Batch:
    return collate([tiny.pack(20, 15, seed=seed), tiny.pack(30, seed=seed + 1)], "segments")


def outputs(found: Trainer, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output of each adapted layer for the inputs that it had in the base model."""
    return {name: found.loss.model.get_submodule(name)(x[name]).detach().clone() for name in x}


def test_measuring_leaves_the_gradients_of_the_training_alone() -> None:
    one = trainer("olora")
    first_step.output_shift(one.loss, one.adapted, batch())
    assert not one.flat.grad.any()
    one.loss(batch()).backward()
    assert one.flat.grad.any()


@pytest.mark.parametrize("method", ["lora", "olora", "pissa"])
def test_a_step_of_b_and_one_of_a_at_the_rate_move_the_outputs_as_far_for_any_method_rank_and_scale(
    method: str,
) -> None:
    sizes = []
    for changes in ({}, {"adapter__rank": 8}, {"adapter__alpha": 32}, {"train__lr_ratio": 4.0}):
        one, inputs = trainer(method, **changes), dict[str, torch.Tensor]()
        modules = {
            name: one.loss.model.get_submodule(name) for name in one.adapted if name != "unused"
        }
        with watched(
            modules, lambda name, x, _, inputs=inputs: inputs.update({name: x.detach().clone()})
        ):
            one.loss(batch())
        scale, ratio = one.config.adapter.scale(), one.config.train.lr_ratio
        rate = first_step.peak_lr(
            first_step.output_shift(one.loss, one.adapted, batch(), ratio), scale, 20
        )
        before = outputs(one, inputs)
        gradients = dict[str, torch.Tensor]()

        def see(
            name: str,
            _: torch.Tensor,
            y: torch.Tensor,
            gradients: dict[str, torch.Tensor] = gradients,
        ) -> None:
            y.register_hook(lambda gradient: gradients.update({name: gradient.flatten(0, -2)}))

        with watched(modules, see):
            one.loss(batch()).backward()
        with torch.no_grad():
            for name, g in gradients.items():
                layer = one.adapted[name]
                layer.db.copy_(-ratio * rate * layer.db.grad.sign())
                b = layer.db if layer.b0 is None else layer.b0 + layer.db
                layer.da.copy_(-rate * ((g @ b).T @ inputs[name].flatten(0, -2)).sign())
        moved = [
            float((y - before[name]).norm() / before[name].norm())
            for name, y in outputs(one, inputs).items()
        ]
        sizes.append(math.exp(sum(map(math.log, moved)) / len(moved)))
    assert sizes == pytest.approx([first_step.FARTHEST] * 4, rel=0.15)


def test_the_rate_is_the_first_that_moves_the_outputs_so_far() -> None:
    rising = [0.0001 * 2.0**number for number in range(len(first_step.RATES))]
    takes_back = [*rising[:8], *[rising[3]] * 5, *rising[13:]]  # 0.0128, then 0.0008
    rates = [first_step.peak_lr({"": tuple(at)}, 1.0, 20) for at in (rising, takes_back)]
    assert rates[0] == rates[1]


def test_the_longest_examples_are_measured_from_their_end() -> None:
    packs = [tiny.pack(40, 30), tiny.pack(20, 700, 60, seed=1)]
    packs[1].supervised[700:720] = False  # the end of the long example has no answer
    (found,) = first_step.examples(packs)
    assert found.segments == (first_step.LONGEST,)
    assert found.input_ids.tolist() == packs[1].input_ids[700 - first_step.LONGEST : 700].tolist()
    assert found.supervised[-1]
    assert [len(each.input_ids) for each in first_step.examples([tiny.pack(*[9, 40] * 30)])] == [
        40
    ] * 3


@pytest.mark.parametrize("attention", ["segments", "sdpa"])
def test_short_rows_get_the_rate_of_long_ones(attention: str) -> None:
    one = trainer("olora", adapter__rank=4, adapter__alpha=4)
    one.loss.model.set_attn_implementation(attention)
    rates = [
        one.automatic_rate([tiny.pack(*lengths, prompt=1) for _ in range(8)], 20, attention)
        for lengths in ([256], [8] * 32, [2] * 128, [2] * 100 + [9])
    ]
    assert rates == pytest.approx([rates[0]] * 4, rel=0.3)


def test_a_rate_at_an_end_of_the_measured_range_is_told() -> None:
    one = trainer("olora")
    measured = first_step.output_shift(one.loss, one.adapted, batch())
    with said() as lines:
        first_step.peak_lr(measured, 1.0, 20)
        assert lines == []
        assert first_step.peak_lr(measured, 1e6, 20) == pytest.approx(first_step.RATES[0], rel=0.05)
    assert len([line for line in lines if "at an end of the range" in line]) == 1


def test_the_automatic_rate_of_the_spectral_step_falls_with_the_root_of_the_rank() -> None:
    low, high = (
        trainer("olora", adapter__rank=rank, train__optimizer="spectral").automatic_rate(
            [], 20, "segments"
        )
        for rank in (2, 8)
    )
    assert low == pytest.approx(2 * high, rel=0.05)
