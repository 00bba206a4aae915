"""Experts whose weights are one parameter: the first output is the base's, and each expert follows its formula."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import find_targets, inject, install, remove, wrap
from olora_ray.adapter.layer import AdaptedExperts, AdaptedStack, AdaptedWeight, Factors
from olora_ray.adapter.methods import method_named
from olora_ray.train.loop import train_mode
from tests.families import zoo
from tests.families.variants import ALL, MIXTURES

RANK, SCALE = 4, 1.5
CPU = torch.device("cpu")
IDS = torch.arange(40).reshape(2, 20) * 7 % 94 + 2
FAMILIES = [*MIXTURES, "granitemoehybrid"]
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])


def adapt(
    model: nn.Module, method: str = "olora", dropout: float = 0.0
) -> dict[str, AdaptedWeight]:
    factors, _ = initialise(find_targets(model, "all-linear", RANK), method, RANK, 0, CPU)
    return inject(model, factors, SCALE, dropout)


def change(adapted: dict[str, AdaptedWeight], size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    for layer in adapted.values():
        for part in (layer.da, layer.db):
            part.data = torch.randn(part.shape, generator=generator) * size


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
@IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_start_equals_the_base_exactly(
    family: str, implementation: str, dtype: torch.dtype
) -> None:
    model = zoo.make(ALL[family], dtype, experts=implementation)
    base = logits(model)
    adapted = adapt(model)
    stacks = [name for name, layer in adapted.items() if isinstance(layer, AdaptedStack)]
    assert {name.rpartition(".")[2] for name in stacks} == {"gate_up_proj", "down_proj"}
    assert torch.equal(logits(model), base)
    change({name: adapted[name] for name in stacks})
    assert not torch.equal(logits(model), base)
    remove(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("family", "method"), [("mixtral", "lora"), *((name, "olora") for name in FAMILIES)]
)
@IMPLEMENTATION
def test_outputs_and_gradients_are_those_of_the_dense_formula(
    family: str, implementation: str, method: str
) -> None:
    """Compare every layer and expert, by autograd, with a base whose weights are W + s (B A - B0 A0)."""
    model = zoo.make(ALL[family], experts=implementation)
    targets = find_targets(model, "all-linear", RANK)
    factors, _ = initialise(targets, method, RANK, 0, CPU)
    reference = {
        f"{name}.{part}": value
        for name, item in factors.items()
        for part, value in _random(item, targets[name].shape[0]).items()
    }
    weights: dict[str, Tensor] = {}
    for name, target in targets.items():
        a0, b0 = factors[name].a0, factors[name].b0
        da, db = reference[f"{name}.da"], reference[f"{name}.db"]
        b = db if b0 is None else b0 + db
        delta = SCALE * (b @ (a0 + da) - (0 if b0 is None else b0 @ a0))
        weight = target.weight() + delta
        key = name if target.experts else f"{name}.weight"
        weights[key] = weight.mT if target.stored_transposed else weight
    expected = functional_call(model, weights, kwargs={"input_ids": IDS, "use_cache": False}).logits
    _some_loss(expected).backward()

    adapted = inject(model, factors, SCALE)
    for name, layer in adapted.items():
        layer.da.data.copy_(reference[f"{name}.da"])
        layer.db.data.copy_(reference[f"{name}.db"])
    found = logits(model)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    _some_loss(found).backward()
    for name, layer in adapted.items():
        for part in ("da", "db"):
            wanted = reference[f"{name}.{part}"].grad
            got = getattr(layer, part).grad
            assert wanted is not None
            assert float((got - wanted).norm()) <= 1e-3 * float(wanted.norm()), f"{name}.{part}"


@IMPLEMENTATION
def test_dropout_is_on_the_adapters_input_and_while_it_trains_only(implementation: str) -> None:
    model = zoo.make(ALL["qwen3_moe"], experts=implementation)
    base = logits(model)
    adapted = adapt(model, dropout=0.5)
    train_mode(adapted, True)
    assert torch.equal(logits(model), base), "the start equals the base with dropout as well"
    train_mode(adapted, False)
    change({name: layer for name, layer in adapted.items() if isinstance(layer, AdaptedStack)})
    train_mode(adapted, True)
    torch.manual_seed(0)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)
    train_mode(adapted, False)
    assert torch.equal(logits(model), logits(model))


def test_several_adapters_share_the_experts_of_one_base() -> None:
    model = zoo.make(ALL["olmoe"])
    base = logits(model)
    factors, _ = initialise(find_targets(model, "all-linear", RANK), "olora", RANK, 0, CPU)
    one, two = wrap(model, factors, SCALE), wrap(model, factors, SCALE)
    change(two)
    install(model, one)
    assert torch.equal(logits(model), base)
    install(model, two)
    assert not torch.equal(logits(model), base)
    install(model, one)
    assert torch.equal(logits(model), base)


class Own(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.num_experts = how, 2
        self.weight = nn.Parameter(torch.rand(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "sum":
            return x @ self.weight.sum(0)
        if self.how == "slice":
            return torch.bmm(x[:, None], self.weight[0:2])[:, 0]
        if self.how == "einsum":
            return torch.einsum("ti,eio->to", x, self.weight)
        if self.how == "other way round":
            return torch.nn.functional.linear(x, self.weight[0])
        return x @ self.weight[0]


@pytest.mark.parametrize("how", ["sum", "slice", "einsum", "other way round"])
def test_a_use_that_an_adapter_cannot_follow_never_passes_it_by(how: str) -> None:
    base = Own(how)
    start = method_named("olora").factors(base.weight.detach().mT, 2, 0)
    adapted = AdaptedExperts(base, {"weight": AdaptedStack(start, 4, True, SCALE)})
    assert base(torch.rand(2, 4)).shape == (2, 4)
    with pytest.raises((NotImplementedError, AttributeError, TypeError)):
        adapted(torch.rand(2, 4))
    assert base(torch.rand(2, 4)).shape == (2, 4), "the base is as it was"
    base.how = "matmul"
    assert adapted(torch.rand(2, 4)).shape == (2, 4)


def _random(start: Factors, m: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(m)
    *experts, rank, n = start.a0.shape
    da = torch.randn(*experts, rank, n, generator=generator) * 0.05
    db = torch.randn(*experts, m, rank, generator=generator) * 0.05
    return {"da": da.requires_grad_(), "db": db.requires_grad_()}


def _some_loss(found: Tensor) -> Tensor:
    wanted = IDS.roll(-1).flatten()
    return torch.nn.functional.cross_entropy(found.flatten(0, 1), wanted)
