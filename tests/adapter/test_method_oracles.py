"""PEFT's initialisation, or the formula in float64, is the oracle of each method."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import METHODS, Options

RANK, ALPHA = 16, 24.0
SCALE = ALPHA / RANK
SHAPES = pytest.mark.parametrize(("m", "n"), [(192, 192), (64, 192), (192, 64), (192, 320)])


def random_weight(m: int, n: int) -> Tensor:
    """As flat a spectrum as those of trained layers, with some directions that stand out."""
    generator = torch.Generator().manual_seed(m * 1000 + n)
    few = torch.randn(m, 5, generator=generator) @ torch.randn(5, n, generator=generator)
    return 0.05 * torch.randn(m, n, generator=generator) + 0.01 * few


def pefts(weight: Tensor, init: str) -> Any:
    """PEFT's layer of this weight, initialised; its base is changed as PEFT does."""
    model = nn.Sequential()
    model.add_module("proj", nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model.proj.weight.data = weight.clone()
    torch.manual_seed(0)
    settings: Any = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["proj"], "init_lora_weights": init}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).base_model.model.proj


def theirs(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()


def ours(weight: Tensor, method: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    use = METHODS[method]
    found: Factors = use.at_scale(use.factors(weight, RANK, seed, Options()), SCALE, Options())
    assert found.b0 is not None
    return found.a0.double(), found.b0.double()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@SHAPES
def test_pissa_is_pefts_up_to_signs(m: int, n: int) -> None:
    weight = random_weight(m, n)
    layer = pefts(weight, "pissa")
    (a, b), (their_a, their_b) = ours(weight, "pissa"), theirs(layer)
    assert relative(b @ a, their_b @ their_a) <= 1e-3
    # PEFT's base comes from an SVD in float32: on one processor it is 1.06e-5 away.
    assert relative(weight - SCALE * b @ a, layer.base_layer.weight.detach().double()) <= 2e-5
    values = torch.linalg.svdvals(weight.double())
    known = (values[:-1] / values[1:] > 1.001)[:RANK]
    known[1:] &= known[:-1].clone()
    assert int(known.sum()) >= RANK // 2
    signs = (a * their_a).sum(1).sign()
    for number in known.nonzero().flatten():
        assert float((a[number] - signs[number] * their_a[number]).abs().max() / a.abs().max()) <= 2e-3
        assert float((b[:, number] - signs[number] * their_b[:, number]).abs().max() / b.abs().max()) <= 2e-3


@SHAPES
@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_the_exact_ones_are_the_svd_in_float64(method: str, m: int, n: int) -> None:
    weight = random_weight(m, n)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    chosen = slice(0, RANK) if method == "pissa" else slice(len(s) - RANK, len(s))
    a, b = ours(weight, method)
    assert relative(SCALE * b @ a, u[:, chosen] * s[chosen] @ vh[chosen]) <= 1e-5
    expected = s[chosen] if method == "pissa" else s[chosen].flip(0)
    torch.testing.assert_close(SCALE * b.norm(dim=0) * a.norm(dim=1), expected, rtol=1e-4, atol=1e-7)


@SHAPES
def test_the_fast_one_leaves_no_more_than_pefts_with_many_iterations(m: int, n: int) -> None:
    weight = random_weight(m, n)
    (a, b), (their_a, their_b) = ours(weight, "pissa_fast"), theirs(pefts(weight, "pissa_niter_16"))
    left = (weight.double() - SCALE * b @ a).norm()
    their_left = (weight.double() - SCALE * their_b @ their_a).norm()
    assert 1 - 1e-2 < float(left / their_left) < 1 + 1e-3
    best = torch.linalg.svdvals(weight.double())[:RANK].pow(2).sum()
    assert float((SCALE * b @ a).pow(2).sum() / best) >= 0.995
    exact_a, exact_b = ours(weight, "pissa")
    assert relative(b @ a, exact_b @ exact_a) < 0.1


def test_orthogonal_has_the_bits_of_pefts_from_the_same_random_numbers() -> None:
    layer = pefts(random_weight(192, 64), "orthogonal")
    torch.manual_seed(5)
    layer.orthogonal_init("default")
    found = METHODS["orthogonal"].factors(random_weight(192, 64), RANK, 5, Options())
    assert torch.equal(found.a0, layer.lora_A["default"].weight)
    assert found.b0 is not None
    assert torch.equal(found.b0, layer.lora_B["default"].weight)


def test_orthogonal_is_two_halves_whose_product_is_zero() -> None:
    a, b = ours(random_weight(192, 64), "orthogonal")
    assert float((b @ a).abs().max()) < 1e-6 * float(b.norm() * a.norm())
    assert torch.linalg.matrix_rank(a, rtol=1e-5) == torch.linalg.matrix_rank(b, rtol=1e-5) == RANK // 2


def test_nora_is_the_formula() -> None:
    weight = random_weight(64, 192)
    generator = torch.Generator().manual_seed(9)
    omega = torch.stack([torch.randn(64, generator=generator) for _ in range(RANK)])
    for sigma, factor in ((0.1, 0.1 / SCALE), ("matched", SCALE * 3**-0.5 / float(weight.norm()) / SCALE)):
        options: Any = Options(sigma=sigma)  # type: ignore[arg-type]
        use = METHODS["nora"]
        found = use.at_scale(use.factors(weight, RANK, 9, options), SCALE, options)
        torch.testing.assert_close(found.a0.double(), factor * omega.double() @ weight.double(), rtol=1e-5, atol=1e-6)
        assert found.b0 is None
