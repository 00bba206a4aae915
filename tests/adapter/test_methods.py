"""The promises and settings of each method, checked against PEFT or the formula."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from olora_ray.adapter.initialise import at_scale, initialise, options_of
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import from_weights, lora, method_named, olora
from olora_ray.adapter.methods.method import Options
from olora_ray.config.schema import METHOD_OPTIONS, Adapter
from olora_ray.config.tables import METHODS
from tests import tiny

sizes, seeds = st.integers(1, 40), st.integers(0, 2**31)


def random_weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_orthonormal(b0: torch.Tensor) -> None:
    assert torch.isfinite(b0).all()
    torch.testing.assert_close(b0.T @ b0, torch.eye(b0.shape[1], dtype=b0.dtype), atol=1e-5, rtol=0)


@given(sizes, sizes, st.data(), seeds)
def test_the_short_qr_gives_the_factors_of_the_full_one(
    m: int, n: int, data: st.DataObject, seed: int
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    weight = random_weight(m, n, seed=seed, dtype=torch.float64)
    assume(torch.linalg.cond(weight[:, :rank]) < 1e6)
    q, r = torch.linalg.qr(weight)
    found = olora.factors(weight, rank, seed=0)
    assert found.b0 is not None
    torch.testing.assert_close(found.b0, q[:, :rank], atol=1e-8, rtol=0)
    torch.testing.assert_close(found.a0, r[:rank], atol=1e-8, rtol=1e-8)
    assert found.full_rank


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "zero slice": lambda weight: weight.index_fill(1, torch.arange(4), 0),
    "zero column": lambda weight: weight.index_fill(1, torch.tensor([2]), 0),
    "twin columns": lambda weight: weight.index_copy(1, torch.tensor([3]), 2 * weight[:, 1:2]),
    "one direction": lambda weight: weight[:, :1] @ weight[:1],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_rank_deficient_slice_is_flagged_and_completed(damage: str) -> None:
    weight = DAMAGES[damage](random_weight(24, 16))
    found = olora.factors(weight, 4, 0)
    assert not found.full_rank
    assert found.b0 is not None
    assert_orthonormal(found.b0)
    torch.testing.assert_close(found.a0, found.b0.T @ weight)


def test_lora_starts_as_torch_initialises_a_linear_layer_with_b_at_zero() -> None:
    found = lora.factors(random_weight(12, 400), 8, 0)
    assert found.b0 is None
    assert found.a0.abs().max() <= 400**-0.5
    assert abs(float(found.a0.std()) * (3 * 400) ** 0.5 - 1) < 0.05


EACH = pytest.mark.parametrize("method", sorted(from_weights()))
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def parts(found: Factors) -> list[Tensor]:
    return [part for part in (found.a0, found.b0) if part is not None]


@EACH
def test_the_same_arguments_give_the_same_factors_whatever_torchs_random_numbers_are(
    method: str,
) -> None:
    weight, ambient = random_weight(20, 14), torch.random.get_rng_state()
    first = method_named(method).factors(weight, 4, 7, Options())
    assert torch.equal(ambient, torch.random.get_rng_state())
    torch.manual_seed(99)
    second = method_named(method).factors(weight, 4, 7, Options())
    assert all(torch.equal(one, two) for one, two in zip(parts(first), parts(second), strict=True))
    assert torch.equal(weight, random_weight(20, 14)), "the weight is left alone"


@EACH
@pytest.mark.parametrize(("m", "n"), [(20, 14), (14, 20)])
def test_a_stack_has_the_factors_of_each_expert(method: str, m: int, n: int) -> None:
    stack = random_weight(3, m, n)
    found = method_named(method).factors(stack, 4, 7, Options())
    for expert in range(3):
        alone = method_named(method).factors(stack[expert], 4, 7 + expert, Options())
        for whole, one in zip(parts(found), parts(alone), strict=True):
            torch.testing.assert_close(whole[expert], one, atol=1e-5, rtol=1e-5)
    stack[1, :] = 0
    assert method_named(method).factors(stack, 4, 7, Options()).full_rank == (
        method in ("lora", "orthogonal")
    )


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def test_the_start_equals_the_base_exactly(method: str, dtype: torch.dtype, make: Any) -> None:
    model, ids = make(dtype=dtype), torch.arange(2, 42).view(2, 20)
    base = model(input_ids=ids).logits
    adapter = Adapter(method=method, rank=4, alpha=7)  # type: ignore[arg-type]
    targets = find_targets(model, "all-linear", 4)
    found, report = initialise(targets, method, 4, 3, CPU, options_of(adapter))
    assert report.deficient == ()
    adapted = inject(model, at_scale(found, adapter), adapter.scale())
    assert torch.equal(model(input_ids=ids).logits, base)
    for layer in adapted.values():
        layer.db.data.fill_(0.1)
    assert not torch.equal(model(input_ids=ids).logits, base)


@EACH
@given(scale=st.floats(0.01, 100.0), seed=seeds)
def test_what_is_taken_off_the_weight_does_not_depend_on_the_scale_where_a_method_divides(
    method: str, scale: float, seed: int
) -> None:
    use, options = method_named(method), Options()
    kept = use.factors(random_weight(9, 12, seed=seed), 4, seed, options)
    found = use.at_scale(kept, scale, options)
    for_a, for_b = use.scale_powers(options)
    torch.testing.assert_close(found.a0 * scale**for_a, kept.a0)
    if kept.b0 is not None and found.b0 is not None:
        torch.testing.assert_close(found.b0 * scale**for_b, kept.b0)
        assert for_a + for_b in (0.0, 1.0)
    if for_a == for_b == 0.0:
        assert found is kept


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_a_weight_of_low_rank_is_named_where_its_vectors_are_arbitrary(method: str) -> None:
    weight = random_weight(24, 3) @ random_weight(3, 16, seed=1)
    assert not method_named(method).factors(weight, 4, 0, Options()).full_rank
    assert method_named(method).factors(weight, 3, 0, Options()).full_rank == (method != "milora")
    found = method_named(method).factors(torch.zeros(6, 5), 2, 0, Options())
    assert all(torch.isfinite(part).all() for part in parts(found))


@EACH
def test_ranks_that_a_shape_does_not_allow_are_one_line(method: str) -> None:
    use = method_named(method)
    limit = use.largest_rank(9, 30)
    assert use.problem(9, 30, limit) is None
    assert f"adapter.method={method}: use at most {limit}" in (
        use.problem(9, 30, limit + use.rank_multiple, "up") or ""
    )
    assert use.problem(9, 30, limit, "up") is None


def test_an_odd_rank_is_refused_with_its_neighbours() -> None:
    line = method_named("orthogonal").problem(30, 30, 7)
    assert line == "adapter.rank=7: orthogonal needs a multiple of 2; use 6 or 8"
    assert method_named("orthogonal").largest_rank(9, 30) == 8


@pytest.mark.parametrize("method", sorted(METHODS.own))
def test_what_a_method_says_of_itself_fits_in_three_lines(method: str) -> None:
    use = method_named(method)
    lines = use.about.splitlines()
    assert use.name == method
    assert 1 <= len(lines) <= 3
    assert all(len(line) <= 120 for line in lines)
    page = " ".join((ROOT / "docs" / "method.md").read_text(encoding="utf-8").split())
    assert f"- **{method}** ({use.source}): {' '.join(lines)}" in page
    assert f"{method}: " in " ".join((Adapter.model_fields["method"].description or "").split())


def test_settings_of_methods_are_those_of_the_config_with_the_same_defaults() -> None:
    assert options_of(Adapter()) == Options()
    assert {name for names in METHOD_OPTIONS.values() for name in names} == set(vars(Options()))
    assert METHOD_OPTIONS.keys() <= METHODS.own.keys()


RANK, ALPHA = 16, 24.0
SCALE = ALPHA / RANK
SHAPES = pytest.mark.parametrize(("m", "n"), [(192, 192), (64, 192), (192, 64), (192, 320)])


def spectral_weight(m: int, n: int) -> Tensor:
    """Return a weight with a spectrum as flat as a trained layer's, and some directions that stand out."""
    generator = torch.Generator().manual_seed(m * 1000 + n)
    few = torch.randn(m, 5, generator=generator) @ torch.randn(5, n, generator=generator)
    return 0.05 * torch.randn(m, n, generator=generator) + 0.01 * few


def pefts(weight: Tensor, init: str) -> Any:
    """Return PEFT's initialised layer of this weight; its base is changed as PEFT changes it."""
    model = nn.Sequential()
    model.add_module("proj", nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model.proj.weight.data = weight.clone()
    torch.manual_seed(0)
    settings: Any = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["proj"],
        "init_lora_weights": init,
    }
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).base_model.model.proj


def ours(weight: Tensor, method: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    use = method_named(method)
    found: Factors = use.at_scale(use.factors(weight, RANK, seed, Options()), SCALE, Options())
    assert found.b0 is not None
    return found.a0.double(), found.b0.double()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@SHAPES
@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_the_exact_ones_are_the_svd_in_float64(method: str, m: int, n: int) -> None:
    weight = spectral_weight(m, n)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    chosen = slice(0, RANK) if method == "pissa" else slice(len(s) - RANK, len(s))
    a, b = ours(weight, method)
    assert relative(SCALE * b @ a, u[:, chosen] * s[chosen] @ vh[chosen]) <= 1e-5
    expected = s[chosen] if method == "pissa" else s[chosen].flip(0)
    torch.testing.assert_close(
        SCALE * b.norm(dim=0) * a.norm(dim=1), expected, rtol=1e-4, atol=1e-7
    )


def test_orthogonal_has_the_bits_of_pefts_from_the_same_random_numbers() -> None:
    layer = pefts(spectral_weight(192, 64), "orthogonal")
    torch.manual_seed(5)
    layer.orthogonal_init("default")
    found = method_named("orthogonal").factors(spectral_weight(192, 64), RANK, 5, Options())
    assert torch.equal(found.a0, layer.lora_A["default"].weight)
    assert found.b0 is not None
    assert torch.equal(found.b0, layer.lora_B["default"].weight)


def test_nora_is_the_formula() -> None:
    weight = spectral_weight(64, 192)
    generator = torch.Generator().manual_seed(9)
    omega = torch.stack([torch.randn(64, generator=generator) for _ in range(RANK)])
    for sigma, factor in (
        (0.1, 0.1 / SCALE),
        ("matched", SCALE * 3**-0.5 / float(weight.norm()) / SCALE),
    ):
        options: Any = Options(sigma=sigma)  # type: ignore[arg-type]
        use = method_named("nora")
        found = use.at_scale(use.factors(weight, RANK, 9, options), SCALE, options)
        torch.testing.assert_close(
            found.a0.double(), factor * omega.double() @ weight.double(), rtol=1e-5, atol=1e-6
        )
        assert found.b0 is None
