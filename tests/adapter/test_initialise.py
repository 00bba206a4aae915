"""Any number of workers computes the factors, and all end with the same bytes."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from olora_ray.adapter.initialise import InitReport, initialise
from olora_ray.adapter.inject import Target
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import from_weights, method_named
from olora_ray.common.errors import UserError
from tests.crew import Crew

CPU = torch.device("cpu")
RANK = 4
WORKERS = pytest.mark.parametrize("workers", [1, 2, 3])


def layers(
    poisoned: str | None = None, flat: str | None = None, count: int = 7
) -> dict[str, Target]:
    generator = torch.Generator().manual_seed(4)
    made: dict[str, Target] = {}
    for number in range(count):
        name = f"block.{number}"
        linear = nn.Linear(8 + 5 * number, 24 - number, bias=False)
        linear.weight.data = torch.randn(linear.weight.shape, generator=generator)
        if name == poisoned:
            linear.weight.data[3, 5] = torch.nan
        if name == flat:
            linear.weight.data[:, 1] = 0.0
        made[name] = Target(linear, "weight", stored_transposed=False)
    return made


def digest(factors: dict[str, Factors]) -> str:
    total = hashlib.sha256()
    for name, item in factors.items():
        total.update(f"{name} {item.full_rank}".encode())
        for part in (item.a0, item.b0):
            total.update(b"" if part is None else part.contiguous().numpy().tobytes())
    return total.hexdigest()


def compute(method: str = "olora", **changes: Any) -> tuple[str, dict[str, Factors], InitReport]:
    factors, report = initialise(layers(**changes), method, RANK, 11, CPU)
    return digest(factors), factors, report


@WORKERS
def test_what_is_wrong_with_a_layer_stops_all_workers_with_its_name(
    crew: Callable[[int], Crew], workers: int
) -> None:
    small = "adapter.rank=12 is too large for block.0 (24 x 8) with adapter.method=pissa: use at most 8, or leave"
    for work, line in (
        (_poisoned, "model.name: the weight of block.5 has NaN or infinite"),
        (_too_large, small),
    ):
        answers = crew(workers).run(work)
        assert [type(answer) for answer in answers] == [UserError] * workers
        assert {str(answer)[: len(line)] for answer in answers} == {line}
        assert len(set(crew(workers).run(_digest_only))) == 1  # and none is left waiting


@pytest.mark.parametrize("method", sorted(set(from_weights()) - {"lora", "orthogonal"}))
@pytest.mark.parametrize(
    ("name", "value"), [("block.1", torch.nan), ("block.1", torch.inf), ("experts.down", torch.inf)]
)
def test_what_reads_the_weight_names_the_layer_that_is_not_finite(
    method: str, name: str, value: float
) -> None:
    targets = mixture()
    targets[name].weight()[..., 2, 4] = value
    with pytest.raises(UserError, match=f"the weight of {name} has NaN or infinite values"):
        initialise(targets, method, RANK, 11, CPU)


@WORKERS
def test_a_rank_deficient_layer_is_reported_by_all(
    crew: Callable[[int], Crew], workers: int
) -> None:
    assert crew(workers).run(_deficient) == [("block.2",)] * workers


@pytest.mark.parametrize("method", from_weights())
def test_workers_without_a_layer_get_the_factors_too(
    crew: Callable[[int], Crew], method: str
) -> None:
    answers = crew(3).run(_one_layer, method)
    assert len({own for own, _, _ in answers}) == 1
    assert answers[0][2].layers == (1, 0, 0)


@pytest.mark.parametrize("method", from_weights())
def test_the_factors_do_not_depend_on_the_number_of_workers(
    crew: Callable[[int], Crew], method: str
) -> None:
    for work in (_digest_only, _digest_of_mixture):
        digests = {found for workers in (1, 2, 3) for found in crew(workers).run(work, method)}
        assert len(digests) == 1, work.__name__


def _too_large() -> None:
    initialise(layers(), "pissa", 12, 0, CPU)


def mixture() -> dict[str, Target]:
    """Return linear layers beside two stacks of experts, one of them stored as E x n x m."""
    found = layers(count=3)
    generator = torch.Generator().manual_seed(6)
    for name, transposed in (("experts.up", False), ("experts.down", True)):
        module = nn.Module()
        module.weight = nn.Parameter(
            torch.randn(5, 12, 10, generator=generator), requires_grad=False
        )
        found[name] = Target(module, "weight", transposed, experts=5)
    return found


def of_mixture(method: str = "olora") -> tuple[str, dict[str, Factors], InitReport]:
    factors, report = initialise(mixture(), method, RANK, 11, CPU)
    return digest(factors), factors, report


@pytest.mark.parametrize("method", from_weights())
@pytest.mark.parametrize(
    "numbers", [1, 300, 2**26], ids=["expert by expert", "in chunks", "at once"]
)
def test_a_stack_is_computed_in_chunks_to_the_same_factors(
    monkeypatch: pytest.MonkeyPatch, method: str, numbers: int
) -> None:
    whole = of_mixture(method)[1]
    monkeypatch.setattr("olora_ray.adapter.initialise.CHUNK", numbers)
    found = of_mixture(method)[1]
    for name, target in mixture().items():
        m, n = target.shape
        experts = [] if target.experts is None else [5]
        assert found[name].a0.shape == (*experts, RANK, n)
        torch.testing.assert_close(found[name].a0, whole[name].a0)
        b0 = found[name].b0
        assert (b0 is not None) == method_named(method).has_b0
        if b0 is not None:
            assert b0.shape == (*experts, m, RANK)
            torch.testing.assert_close(b0, whole[name].b0)
            if method == "olora":
                torch.testing.assert_close(found[name].a0, b0.mT @ target.weight())


def _poisoned() -> None:
    compute(poisoned="block.5")


def _deficient() -> tuple[str, ...]:
    return compute(flat="block.2")[2].deficient


def _digest_only(method: str = "olora") -> str:
    return compute(method)[0]


def _digest_of_mixture(method: str) -> str:
    return of_mixture(method)[0]


def _one_layer(method: str) -> tuple[str, dict[str, Factors], InitReport]:
    return compute(method, count=1)
