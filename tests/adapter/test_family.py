"""What every method of the family promises, and what each says of itself."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olora_ray.adapter.initialise import at_scale, initialise, options_of
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.adapter.methods import FROM_WEIGHTS, METHODS, Options
from olora_ray.adapter.methods.nora import ROW
from olora_ray.config.schema import METHOD_OPTIONS, Adapter
from tests import tiny

EACH = pytest.mark.parametrize("method", sorted(FROM_WEIGHTS))
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
sizes, seeds = st.integers(2, 40), st.integers(0, 2**31)


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(found: Factors) -> list[Tensor]:
    return [part for part in (found.a0, found.b0) if part is not None]


@EACH
def test_shapes_and_precision(method: str) -> None:
    for m, n in ((24, 10), (10, 24)):
        found = METHODS[method].factors(random_weight(m, n), 4, 7, Options())
        assert found.a0.shape == (4, n)
        assert (found.b0 is not None) == METHODS[method].has_b0
        assert found.b0 is None or found.b0.shape == (m, 4)
        assert {part.dtype for part in parts(found)} == {torch.float32}
        assert all(part.is_contiguous() for part in parts(found))
        assert found.full_rank


@EACH
def test_the_same_arguments_give_the_same_factors_whatever_torchs_random_numbers_are(method: str) -> None:
    weight = random_weight(20, 14)
    ambient = torch.random.get_rng_state()
    first = METHODS[method].factors(weight, 4, 7, Options())
    assert torch.equal(ambient, torch.random.get_rng_state())
    torch.manual_seed(99)
    second = METHODS[method].factors(weight, 4, 7, Options())
    assert all(torch.equal(one, two) for one, two in zip(parts(first), parts(second), strict=True))


@EACH
def test_the_weight_is_left_alone(method: str) -> None:
    weight = random_weight(20, 14)
    before = weight.clone()
    METHODS[method].factors(weight, 4, 7, Options())
    assert torch.equal(weight, before)


@EACH
@pytest.mark.parametrize(("m", "n"), [(20, 14), (14, 20)])
def test_a_stack_has_the_factors_of_each_expert(method: str, m: int, n: int) -> None:
    stack = random_weight(3, m, n)
    found = METHODS[method].factors(stack, 4, 7, Options())
    for expert in range(3):
        alone = METHODS[method].factors(stack[expert], 4, 7 + expert, Options())
        for whole, one in zip(parts(found), parts(alone), strict=True):
            torch.testing.assert_close(whole[expert], one, atol=1e-5, rtol=1e-5)
    stack[1, :] = 0
    assert METHODS[method].factors(stack, 4, 7, Options()).full_rank == (method in ("lora", "orthogonal"))


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
    use, options = METHODS[method], Options()
    kept = use.factors(random_weight(9, 12, seed=seed), 4, seed, options)
    found = use.at_scale(kept, scale, options)
    for_a, for_b = use.scale_powers(options)
    torch.testing.assert_close(found.a0 * scale**for_a, kept.a0)
    if kept.b0 is not None and found.b0 is not None:
        torch.testing.assert_close(found.b0 * scale**for_b, kept.b0)
        assert for_a + for_b in (0.0, 1.0)
    if for_a == for_b == 0.0:
        assert found is kept


@pytest.mark.parametrize("method", ["pissa", "pissa_fast", "milora"])
@given(m=sizes, n=sizes, data=st.data(), seed=seeds)
def test_the_adapters_share_of_the_weight_is_a_projection_of_it(
    method: str, m: int, n: int, data: st.DataObject, seed: int
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    weight = random_weight(m, n, seed=seed)
    found = METHODS[method].factors(weight, rank, seed, Options())
    assert found.b0 is not None
    share, size = found.b0 @ found.a0, float(weight.norm())
    rest = weight - share
    assert float((share.mT @ rest).abs().max()) < 1e-5 * size**2
    if method != "pissa_fast":
        assert float((share @ rest.mT).abs().max()) < 1e-5 * size**2
    torch.testing.assert_close(found.a0.norm(dim=1), found.b0.norm(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["pissa", "pissa_fast", "milora"])
def test_a_weight_of_low_rank_is_named_where_its_vectors_are_arbitrary(method: str) -> None:
    weight = random_weight(24, 3) @ random_weight(3, 16, seed=1)
    assert not METHODS[method].factors(weight, 4, 0, Options()).full_rank
    assert METHODS[method].factors(weight, 3, 0, Options()).full_rank == (method != "milora")
    found = METHODS[method].factors(torch.zeros(6, 5), 2, 0, Options())
    assert all(torch.isfinite(part).all() for part in parts(found))


@given(m=sizes, n=sizes, seed=seeds, scale=st.floats(0.1, 10.0))
def test_matched_rows_of_nora_are_as_long_as_those_of_lora_at_any_scale(
    m: int, n: int, seed: int, scale: float
) -> None:
    weight = 3.0 * random_weight(m, n, seed=seed)
    use, matched, number = METHODS["nora"], Options(sigma="matched"), Options(sigma=0.02)
    found = use.at_scale(use.factors(weight, 400, seed, matched), scale, matched)
    assert float(found.a0.pow(2).sum(1).mean().sqrt()) == pytest.approx(ROW, rel=0.25)
    plain = use.at_scale(use.factors(weight, 400, seed, number), scale, number)
    torch.testing.assert_close(plain.a0 * (scale / 0.02), found.a0 * (float(weight.norm()) / ROW), atol=1e-3, rtol=1e-3)
    lora = METHODS["lora"].factors(torch.zeros(1, 400), 400, seed, Options())
    assert float(lora.a0.pow(2).sum(1).mean().sqrt()) == pytest.approx(ROW, rel=0.02)


@EACH
def test_ranks_that_a_shape_does_not_allow_are_one_line(method: str) -> None:
    use = METHODS[method]
    limit = use.largest_rank(9, 30)
    assert use.problem(9, 30, limit) is None
    assert f"adapter.method={method}: use at most {limit}" in (
        use.problem(9, 30, limit + use.rank_multiple, "up") or ""
    )
    assert use.problem(9, 30, limit, "up") is None


def test_an_odd_rank_is_refused_with_its_neighbours() -> None:
    line = METHODS["orthogonal"].problem(30, 30, 7)
    assert line == "adapter.rank=7: orthogonal needs a multiple of 2; use 6 or 8"
    assert METHODS["orthogonal"].problem(30, 30, 1) == "adapter.rank=1: orthogonal needs a multiple of 2; use 2"
    assert METHODS["orthogonal"].largest_rank(9, 30) == 8


@EACH
def test_the_config_refuses_what_the_method_refuses_for_its_rank_alone(method: str) -> None:
    for rank in (1, 2, 7, 8):
        expected = pytest.raises(ValueError) if METHODS[method].problem(99, 99, rank) else contextlib.nullcontext()
        with expected:
            Adapter(method=method, rank=rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_costs_grow_with_the_layer_and_are_never_nothing(method: str) -> None:
    cost = METHODS[method].cost
    assert 0 < cost(1, 1, 1) <= cost(8, 8, 2) <= cost(64, 8, 2) <= cost(64, 64, 8)


def test_an_svd_costs_more_than_a_short_qr() -> None:
    assert METHODS["pissa"].cost(4096, 4096, 16) > 100 * METHODS["olora"].cost(4096, 4096, 16)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_a_method_says_of_itself_fits_in_three_lines(method: str) -> None:
    use = METHODS[method]
    lines = use.about.splitlines()
    assert use.name == method
    assert 1 <= len(lines) <= 3
    assert all(len(line) <= 120 for line in lines)
    page = " ".join((ROOT / "docs" / "method.md").read_text(encoding="utf-8").split())
    assert f"- **{method}** ({use.source}): {' '.join(lines)}" in page
    assert f"{method}: " in (Adapter.model_fields["method"].description or "")


def test_settings_of_methods_are_those_of_the_config_with_the_same_defaults() -> None:
    assert options_of(Adapter()) == Options()
    assert {name for names in METHOD_OPTIONS.values() for name in names} == set(vars(Options()))
    assert METHOD_OPTIONS.keys() <= METHODS.keys()


def test_a_stack_at_its_start_changes_nothing_and_keeps_its_shapes() -> None:
    for use in map(METHODS.__getitem__, FROM_WEIGHTS):
        start = use.at_scale(use.factors(random_weight(3, 12, 10), 4, 0, Options()), 2.0, Options())
        change = AdapterWeights(start, torch.zeros(3, 4, 10), torch.zeros(3, 12, 4)).delta(2.0)
        assert change.shape == (3, 12, 10)
        assert not change.any()
