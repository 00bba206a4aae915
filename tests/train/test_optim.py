"""One flat vector behind all adapters, the optimizer on it, and the learning rate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from olora_ray.adapter.layer import AdaptedLinear, Factors
from olora_ray.config.schema import Train
from olora_ray.train.loader import lr_at
from olora_ray.train.optim import AdamW, FlatAdapters

SHAPES = {"first": (5, 3), "second": (4, 7)}
RANK = 2


def adapted() -> dict[str, AdaptedLinear]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: AdaptedLinear(
            nn.Linear(n, m), Factors(torch.randn(RANK, n, generator=generator), torch.randn(m, RANK)), 1.0
        )
        for name, (m, n) in SHAPES.items()
    }


def random_gradients(flat: FlatAdapters, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(slot.shape, generator=generator) for name, slot in flat.slots.items()}


def test_parameters_and_gradients_are_views_of_two_vectors() -> None:
    layers = adapted()
    flat = FlatAdapters(layers)
    assert flat.vector.numel() == sum(RANK * (m + n) for m, n in SHAPES.values())
    for number, name in enumerate(flat.slots):
        flat.view(flat.vector, name).fill_(number + 1.0)
        flat.view(flat.grad, name).fill_(-number - 1.0)
    values = [layer_part for layer in layers.values() for layer_part in (layer.da, layer.db)]
    for number, parameter in enumerate(values):
        assert (parameter == number + 1.0).all()
        assert parameter.grad is not None
        assert (parameter.grad == -number - 1.0).all()
    assert 0.0 not in flat.vector


def flat_for(config: Train) -> FlatAdapters:
    return FlatAdapters(adapted(), apart=config.lr_ratio != 1)


@pytest.mark.parametrize("ratio", [1.0, 16.0, 0.25])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torchs_on_separate_tensors(decay: float, ratio: float) -> None:
    config = Train(weight_decay=decay, clip=None, lr=0.01, lr_ratio=ratio)
    flat = flat_for(config)
    ours = AdamW(flat, config)
    separate = {name: nn.Parameter(slot.detach().clone()) for name, slot in flat.slots.items()}
    groups = [{"params": [p for name, p in separate.items() if name.endswith(part)]} for part in (".da", ".db")]
    theirs = torch.optim.AdamW(groups, lr=0.01, weight_decay=decay)
    for step in range(4):
        for group, factor in zip(theirs.param_groups, (1.0, ratio), strict=True):
            group["lr"] = factor * 0.01 / (step + 1)
        for name, gradient in random_gradients(flat, step).items():
            separate[name].grad = gradient
            flat.view(flat.grad, name).copy_(gradient)
        theirs.step()
        ours.step(0.01 / (step + 1))
        for name, parameter in separate.items():
            torch.testing.assert_close(flat.slots[name].detach(), parameter.detach())


def test_one_rate_for_both_leaves_every_bit_as_a_single_vector_has_it() -> None:
    flat = FlatAdapters(adapted())
    assert list(flat.slots) == ["first.da", "first.db", "second.da", "second.db"]
    ours, alone = AdamW(flat, Train(clip=1.0)), nn.Parameter(flat.vector.clone())
    theirs = torch.optim.AdamW([alone], lr=0.01, weight_decay=0.0)
    for step in range(5):
        gradient = torch.cat([part.reshape(-1) for part in random_gradients(flat, step).values()])
        flat.grad.copy_(gradient)
        alone.grad = gradient * (1.0 / float(gradient.norm()))
        theirs.step()
        ours.step(0.01)
        assert torch.equal(flat.vector, alone)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_clipping_is_that_of_torch_and_reports_the_norm_before(size: float) -> None:
    flat = FlatAdapters(adapted())
    separate = []
    for name, gradient in random_gradients(flat, 1).items():
        flat.view(flat.grad, name).copy_(gradient * size)
        separate.append(nn.Parameter(torch.zeros_like(gradient)))
        separate[-1].grad = gradient * size
    optimizer = AdamW(flat, Train(clip=1.0))
    seen = []
    optimizer.inner.register_step_pre_hook(lambda *_: seen.append(flat.grad.clone()))
    norm = optimizer.step(0.0)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(separate, 1.0)))
    clipped = torch.cat([part.grad.reshape(-1) for part in separate if part.grad is not None])
    torch.testing.assert_close(seen[0], clipped)


def test_decay_pulls_towards_the_start() -> None:
    flat = FlatAdapters(adapted())
    flat.vector.fill_(1.0)
    AdamW(flat, Train(weight_decay=0.5)).step(0.1)
    torch.testing.assert_close(flat.vector, torch.full_like(flat.vector, 0.95))


@pytest.mark.parametrize("config", [Train(), Train(lr_ratio=4.0)], ids=["one rate", "two rates"])
def test_the_state_comes_back_exactly(config: Train) -> None:
    def run(optimizer: AdamW, steps: range) -> None:
        for step in steps:
            for name, gradient in random_gradients(optimizer.flat, step).items():
                optimizer.flat.view(optimizer.flat.grad, name).copy_(gradient)
            optimizer.step(0.01)

    whole = AdamW(flat_for(config), config)
    run(whole, range(6))
    first = AdamW(flat_for(config), config)
    run(first, range(3))
    second = AdamW(flat_for(config), config)
    second.flat.vector.copy_(first.flat.vector)
    second.load({name: value.clone() for name, value in first.state().items()}, 3)
    run(second, range(3, 6))
    assert torch.equal(second.flat.vector, whole.flat.vector)
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())
    assert whole.state().keys() == AdamW(FlatAdapters(adapted()), Train()).state().keys()


def moved(device: str, fused: bool | None = None) -> tuple[AdamW, list[float]]:
    """Return an optimizer after a few steps on a device, some of them clipped, and the norms."""
    layers = {name: layer.to(device) for name, layer in adapted().items()}
    config = Train(weight_decay=0.1, lr_ratio=4.0, clip=10.0)
    optimizer = AdamW(FlatAdapters(layers, apart=True), config, fused)
    norms = []
    for step in range(6):
        for name, gradient in random_gradients(optimizer.flat, step).items():
            optimizer.flat.view(optimizer.flat.grad, name).copy_(gradient * (step + 1) / 3)
        norms.append(optimizer.step(0.01))
        if step == 2:  # as from a checkpoint
            optimizer.load({name: value.clone() for name, value in optimizer.state().items()}, 3)
    return optimizer, norms


def test_cpus_have_the_plain_update() -> None:
    optimizer, norms = moved("cpu")
    assert min(norms) < 10.0 < max(norms)
    assert optimizer.inner.defaults["fused"] is None
    assert {float(state["step"]) for state in optimizer.inner.state.values()} == {6.0}


def test_the_update_in_one_kernel_is_the_plain_one_but_for_rounding() -> None:
    plain, _ = moved("cpu")
    fused, _ = moved("cpu", fused=True)
    assert fused.inner.defaults["fused"]
    torch.testing.assert_close(fused.flat.vector, plain.flat.vector)
    for name, moment in plain.state().items():
        torch.testing.assert_close(fused.state()[name], moment)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_updates_in_one_kernel_and_is_not_waited_for() -> None:
    plain, norms = moved("cpu")
    fused, found = moved("cuda")
    assert fused.inner.defaults["fused"]
    assert found == pytest.approx(norms)
    torch.testing.assert_close(fused.flat.vector.cpu(), plain.flat.vector)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused.step(0.01, norms[-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


schedules = st.sampled_from(["cosine", "linear", "constant"])
fractions = st.floats(0.0, 0.99)


@given(schedules, fractions, st.integers(1, 300))
def test_the_learning_rate_rises_to_its_peak_and_then_never_again(schedule: str, warmup: float, steps: int) -> None:
    config = Train.model_validate({"schedule": schedule, "warmup": warmup})
    rates = [lr_at(step, steps, config, 0.1) for step in range(steps)]
    peak = min(round(warmup * steps), steps - 1)
    assert all(0.0 < rate <= 0.1 for rate in rates)  # no step is wasted
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if round(warmup * steps) < steps:
        assert rates[peak] == pytest.approx(0.1)


@given(st.floats(0.0, 0.9), st.integers(10, 300))
def test_the_ends_of_the_schedules(warmup: float, steps: int) -> None:
    def rate(schedule: str, step: int) -> float:
        return lr_at(step, steps, Train.model_validate({"schedule": schedule, "warmup": warmup}), 0.1)

    assert rate("cosine", steps) == pytest.approx(0.0, abs=1e-12)
    assert rate("linear", steps) == pytest.approx(0.0, abs=1e-12)
    assert rate("constant", steps) == pytest.approx(0.1)


def test_the_middle_of_the_schedules() -> None:
    def middle(schedule: str) -> float:
        return lr_at(60, 100, Train.model_validate({"schedule": schedule, "warmup": 0.2}), 0.1)

    assert middle("linear") == pytest.approx(0.05)
    assert middle("cosine") == pytest.approx(0.05)
    assert lr_at(40, 100, Train(warmup=0.2), 0.1) == pytest.approx(0.05 * (1 + math.cos(math.pi / 4)))


def test_warm_up_is_linear() -> None:
    config = Train(warmup=0.1)
    assert [lr_at(step, 100, config, 0.11) for step in range(10)] == pytest.approx([0.01 * (i + 1) for i in range(10)])
