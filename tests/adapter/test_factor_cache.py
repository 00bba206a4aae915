from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.adapter import initialise
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import FROM_WEIGHTS, METHODS
from olora_ray.adapter.methods.method import DEFAULTS

ORIGIN = {"base model": "abc", "method": "olora", "targets": '"all-linear"', "seed": "3"}


@pytest.mark.parametrize("method", sorted(name for name in FROM_WEIGHTS if METHODS[name].prefix))
@given(m=st.integers(12, 40), n=st.integers(12, 40), rank=st.integers(1, 12), seed=st.integers(0, 9))
def test_the_factors_of_a_smaller_rank_are_a_prefix(method: str, m: int, n: int, rank: int, seed: int) -> None:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    large, small = (METHODS[method].factors(weight, size, seed, DEFAULTS) for size in (12, rank))
    torch.testing.assert_close(large.a0[:rank], small.a0, rtol=0, atol=2e-6)
    assert (large.b0 is None) == (small.b0 is None)
    if large.b0 is not None and small.b0 is not None:
        torch.testing.assert_close(large.b0[:, :rank], small.b0, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", sorted(name for name in FROM_WEIGHTS if not METHODS[name].prefix))
def test_what_promises_no_prefix_has_none(method: str) -> None:
    weight = torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    large, small = (METHODS[method].factors(weight, size, 3, DEFAULTS) for size in (6, 4))
    assert float((large.a0[:4] - small.a0).abs().max()) > 1e-4


def test_without_a_prefix_the_rank_must_be_that_of_the_factors(tmp_path: Path) -> None:
    initialise.write(str(tmp_path), factors(), ORIGIN, 8, prefix=False)
    assert initialise.read(str(tmp_path), ORIGIN, 4, ["layer0"]) is None
    found = initialise.read(str(tmp_path), ORIGIN, 8, ["layer0"])
    assert found is not None
    assert torch.equal(found["layer0"].a0, factors()["layer0"].a0)


def factors(full_rank: bool = True) -> dict[str, Factors]:
    made = {}
    for number in range(3):
        weight = torch.randn(20 + number, 24, generator=torch.Generator().manual_seed(number))
        found = METHODS["olora"].factors(weight, 8, 0)
        made[f"layer{number}"] = Factors(found.a0, found.b0, full_rank or number != 1)
    return made


@pytest.mark.parametrize("place", ["{}", "file://{}"])
def test_what_is_kept_reads_back_at_any_rank_up_to_its_own(tmp_path: Path, place: str) -> None:
    where, made = place.format(tmp_path / "shared"), factors()
    initialise.write(where, made, ORIGIN, 8)
    for rank in (1, 5, 8):
        found = initialise.read(where, ORIGIN, rank, list(made))
        assert found is not None
        for name, whole in made.items():
            assert torch.equal(found[name].a0, whole.a0[:rank])
            assert whole.b0 is not None
            assert torch.equal(found[name].b0, whole.b0[:, :rank])  # type: ignore[arg-type]
    assert initialise.read(where, ORIGIN, 9, list(made)) is None


def test_the_factors_of_experts_read_back_at_a_smaller_rank(tmp_path: Path) -> None:
    weight = torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(0))
    made = {"experts.up": METHODS["olora"].factors(weight, 8, 0)}
    initialise.write(str(tmp_path), made, ORIGIN, 8)
    found = initialise.read(str(tmp_path), ORIGIN, 3, ["experts.up"])
    assert found is not None
    whole, part = made["experts.up"], found["experts.up"]
    assert whole.b0 is not None
    assert part.b0 is not None
    assert torch.equal(part.a0, whole.a0[:, :3])
    assert torch.equal(part.b0, whole.b0[:, :, :3])
    torch.testing.assert_close(part.a0, METHODS["olora"].factors(weight, 3, 0).a0, rtol=0, atol=2e-6)


def test_factors_without_b0_read_back(tmp_path: Path) -> None:
    made = {"layer": METHODS["lora"].factors(torch.randn(20, 24), 8, 0)}
    initialise.write(str(tmp_path), made, ORIGIN, 8)
    found = initialise.read(str(tmp_path), ORIGIN, 4, ["layer"])
    assert found is not None
    assert found["layer"].b0 is None


@pytest.mark.parametrize("what", sorted(ORIGIN))
def test_factors_of_another_origin_are_not_taken(tmp_path: Path, what: str) -> None:
    initialise.write(str(tmp_path), factors(), ORIGIN, 8)
    assert initialise.has(str(tmp_path), ORIGIN, 8)
    assert not initialise.has(str(tmp_path), ORIGIN | {what: "other"}, 8)


def test_completed_factors_are_computed_anew_for_each_rank(tmp_path: Path) -> None:
    initialise.write(str(tmp_path), factors(full_rank=False), ORIGIN, 8)
    assert not initialise.has(str(tmp_path), ORIGIN, 4)


def test_damaged_files_count_as_missing(tmp_path: Path) -> None:
    initialise.write(str(tmp_path), factors(), ORIGIN, 8)
    (tmp_path / initialise.TENSORS).write_bytes(b"\0" * 100)
    assert initialise.read(str(tmp_path), ORIGIN, 4, ["layer0"]) is None
    (tmp_path / initialise.DESCRIPTION).write_text("{")
    assert not initialise.has(str(tmp_path), ORIGIN, 4)
