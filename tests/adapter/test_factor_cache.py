from dataclasses import replace
from pathlib import Path

import pytest
import torch

from olora_ray.adapter.factor_cache import DESCRIPTION, TENSORS, StoredFactors
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import method_named

ORIGIN = {"base model": "abc", "method": "olora", "targets": '"all-linear"', "seed": "3"}


def factors(full_rank: bool = True) -> dict[str, Factors]:
    """Return two layers, one of them without B0, and a stack of experts."""
    made = {}
    for name, shape, method in (
        ("layer0", (20, 24), "olora"),
        ("layer1", (21, 24), "lora"),
        ("up", (3, 20, 24), "olora"),
    ):
        found = method_named(method).factors(
            torch.randn(shape, generator=torch.Generator().manual_seed(0)), 8, 0
        )
        made[name] = Factors(found.a0, found.b0, full_rank or name != "layer1")
    return made


@pytest.mark.parametrize("place", ["{}", "file://{}"])
def test_what_is_kept_reads_back_at_any_rank_up_to_its_own(tmp_path: Path, place: str) -> None:
    where, made = place.format(tmp_path / "shared"), factors()
    StoredFactors(where, ORIGIN, 8).write(made)
    for rank in (1, 5, 8):
        found = StoredFactors(where, ORIGIN, rank).read(list(made))
        assert found is not None
        for name, whole in made.items():
            assert torch.equal(found[name].a0, whole.a0[..., :rank, :])
            b0 = found[name].b0
            assert (whole.b0 is None) == (b0 is None)
            assert whole.b0 is None or b0 is None or torch.equal(b0, whole.b0[..., :rank])
    assert StoredFactors(where, ORIGIN, 9).read(list(made)) is None


@pytest.mark.parametrize("what", sorted(ORIGIN))
def test_factors_of_another_origin_are_not_taken(tmp_path: Path, what: str) -> None:
    stored = StoredFactors(str(tmp_path), ORIGIN, 8)
    stored.write(factors())
    assert stored.exist()
    assert not replace(stored, origin=ORIGIN | {what: "other"}).exist()


def test_completed_factors_are_computed_anew_for_each_rank(tmp_path: Path) -> None:
    StoredFactors(str(tmp_path), ORIGIN, 8).write(factors(full_rank=False))
    assert not StoredFactors(str(tmp_path), ORIGIN, 4).exist()


def test_damaged_files_count_as_missing(tmp_path: Path) -> None:
    StoredFactors(str(tmp_path), ORIGIN, 8).write(factors())
    stored = StoredFactors(str(tmp_path), ORIGIN, 4)
    (tmp_path / TENSORS).write_bytes(b"\0" * 100)
    assert stored.read(["layer0"]) is None
    (tmp_path / DESCRIPTION).write_text("{")
    assert not stored.exist()
