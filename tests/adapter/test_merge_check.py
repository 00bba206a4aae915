"""The files of a merged folder decide: the right number and no other, and not a byte besides."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from olora_ray.adapter import merge, stored
from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.config.schema import Adapter
from tests import tiny
from tests.export_parts import Case, make_case, make_stacked_case
from tests.families import zoo
from tests.families.variants import ALL

SETTINGS = Adapter(method="olora", rank=4, alpha=6)
LAYER = "model.layers.1.mlp.down_proj"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return make_case(tmp_path / "base", tiny.llama(dtype=request.param), SETTINGS, shard="100KB")


def check(case: Case, folder: Path) -> merge.Worst:
    found = stored.groups(case.base, case.model, case.adapter)
    return merge.check_weights(case.base, folder, found, case.adapter, case.scale)


def changed(case: Case, folder: Path) -> list[str]:
    return merge.changed(case.base, folder, stored.groups(case.base, case.model, case.adapter))


def test_a_right_merge_is_right(case: Case, tmp_path: Path) -> None:
    folder = case.write_merged(tmp_path / "merged")
    found = check(case, folder)
    assert 0 < found.error <= 1
    assert f"torch.{found.stored}" == str(stored.DTYPES[next(iter(stored.tensors(case.base).values())).dtype])
    assert changed(case, folder) == []


def wrong_adapter(case: Case, make: Callable[[AdapterWeights], AdapterWeights | None]) -> dict[str, AdapterWeights]:
    found = {name: make(item) if name == LAYER else item for name, item in case.adapter.items()}
    return {name: item for name, item in found.items() if item is not None}


WRONG: dict[str, Callable[[AdapterWeights], AdapterWeights | None]] = {
    "left out": lambda item: None,
    "scale 2 % off": lambda item: replace(item, da=item.da * 1.02, db=item.db * 1.02),
    "start not taken off": lambda item: AdapterWeights(Factors(item.factors.a0, None), item.da, item.db),
    "a row swapped": lambda item: replace(item, da=item.da[[1, 0, 2, 3]]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_one_wrong_layer_is_caught_and_named(case: Case, tmp_path: Path, kind: str) -> None:
    merge.write_merged(case.base, wrong_adapter(case, WRONG[kind]), case.scale, tmp_path / "merged", case.model)
    found = check(case, tmp_path / "merged")
    assert found.error > 1
    assert found.layer == LAYER


def test_the_neighbour_of_the_right_number_is_wrong(tmp_path: Path) -> None:
    """One unit in the last place of one weight, in the precision where that is least: bfloat16."""
    case = make_case(tmp_path / "base", tiny.llama(dtype=torch.bfloat16), SETTINGS)
    file = case.write_merged(tmp_path / "merged") / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.weight"].view(torch.int16)[3, 5] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert check(case, tmp_path / "merged").error > 1


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_no_number_is_no_right_number(tmp_path: Path, number: float) -> None:
    case = make_case(tmp_path / "base", tiny.llama(), SETTINGS)
    file = case.write_merged(tmp_path / "merged") / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.weight"][3, 5] = number
    save_file(tensors, file, metadata={"format": "pt"})
    assert not check(case, tmp_path / "merged").error <= 1


def test_one_experts_slice_is_caught(tmp_path: Path) -> None:
    case = make_stacked_case(tmp_path / "base", zoo.make(ALL["qwen3_moe mlp"]), Adapter(rank=3, alpha=6))
    file = case.write_merged(tmp_path / "merged") / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.experts.{}.up_proj.weight"
    tensors[name.format(2)] = load_file(case.base / "model.safetensors")[name.format(2)]
    save_file(tensors, file, metadata={"format": "pt"})
    found = check(case, tmp_path / "merged")
    assert found.error > 1
    assert found.layer == "model.layers.1.mlp.experts.gate_up_proj"


def test_one_byte_elsewhere_is_caught_and_named(case: Case, tmp_path: Path) -> None:
    folder = case.write_merged(tmp_path / "merged")
    place = stored.tensors(folder)["model.norm.weight"]
    with (folder / place.file).open("r+b") as file:
        file.seek(place.start + 7)
        byte = file.read(1)
        file.seek(place.start + 7)
        file.write(bytes([byte[0] ^ 1]))
    assert check(case, folder).error <= 1
    assert changed(case, folder) == [f"{place.file}: byte {place.start + 7} (of model.norm.weight) is not the base's"]


def test_files_that_are_not_the_bases_are_caught(case: Case, tmp_path: Path) -> None:
    folder = case.write_merged(tmp_path / "merged")
    (folder / "old.safetensors").write_bytes(b"")
    assert "old.safetensors" in changed(case, folder)[0]
    (folder / "old.safetensors").unlink()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert changed(case, folder) == ["config.json is not the base's"]


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(-6, 1),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_no_right_merge_of_any_size_is_over_one(
    m: int, n: int, rank: int, power: int, dtype: torch.dtype, with_start: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 10.0**power

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    start = Factors(draw(rank, n), draw(m, rank) / m**0.5 if with_start else None)
    change = merge.Change(AdapterWeights(start, size * draw(rank, n), size * draw(m, rank)), 0.7, transposed=False)
    base = (0.1 * draw(m, n)).to(dtype)
    merged = (base.float() + change.merged(0, m, torch.device("cpu"))).to(dtype)
    assert merge._error(base, merged, change, 0, torch.device("cpu")) <= 1
