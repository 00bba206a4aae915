import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from olora_ray.adapter import export, parity
from olora_ray.adapter.factors import AdapterWeights
from olora_ray.config.schema import Adapter
from tests import tiny
from tests.export_parts import IDS, Case, make_case

SETTINGS = Adapter(method="olora", rank=4, alpha=6)
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # Tiny matrices: a second thread only waits, for long on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measure(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> parity.Parity:
    """Export as a run does, unless a test has written a wrong folder already."""
    merged, plain = folder / "merged", folder / "adapter"
    if not merged.exists():
        export.write_merged(case.base, case.adapter, case.scale, merged, transposed=case.transposed)
    if not plain.exists():
        export.write_adapter(case.adapter, case.settings, "base", plain, transposed=case.transposed)
    return parity.measure_parity(case.base, case.adapter, case.scale, merged, plain, [IDS], dtype=dtype)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case") / "base", tiny.llama(dtype=request.param), SETTINGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_export_passes(case: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    found = measure(case, tmp_path, dtype)
    assert found.ok, found.problems()
    assert found.tokens == IDS.numel()
    assert found.effect > 10 * found.merged.mean
    stored = json.loads(json.dumps(found.to_json()))
    assert stored["ok"] is True
    assert stored["merged"]["max"] <= stored["merged"]["bound_max"]


@pytest.mark.parametrize("settings", [SETTINGS, Adapter(method="lora", rank=4, alpha=6, rank_stabilized=True)])
def test_conv1d_passes(tmp_path: Path, settings: Adapter) -> None:
    found = measure(make_case(tmp_path / "base", tiny.gpt2(), settings), tmp_path)
    assert found.ok, found.problems()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_that_misses_one_layer_is_caught(case: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    fewer = {name: item for name, item in case.adapter.items() if name != LAYER}
    export.write_merged(case.base, fewer, case.scale, tmp_path / "merged")
    found = measure(case, tmp_path, dtype)
    assert not found.ok
    assert found.merged_weights > 1
    assert not found.merged.ok or dtype == torch.bfloat16


def test_a_merge_with_a_wrong_scale_is_caught(case: Case, tmp_path: Path) -> None:
    export.write_merged(case.base, case.adapter, case.scale * 1.05, tmp_path / "merged")
    found = measure(case, tmp_path)
    assert found.merged_weights > 1
    assert "merged" in found.problems()[0]


def test_a_merge_of_the_fold_form_is_caught(case: Case, tmp_path: Path) -> None:
    # W + s B A without taking B0 A0 off: OLoRA weights treated as a plain LoRA.
    def start_kept(item: AdapterWeights) -> AdapterWeights:
        start = item.factors
        assert start.b0 is not None
        return AdapterWeights(replace(start, b0=None), item.da, start.b0 + item.db)

    export.write_merged(case.base, {n: start_kept(w) for n, w in case.adapter.items()}, case.scale, tmp_path / "merged")
    found = measure(case, tmp_path)
    assert not found.merged.ok
    assert found.merged_weights > 1


def edit_config(case: Case, folder: Path, **fields: object) -> None:
    export.write_adapter(case.adapter, case.settings, "base", folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_whose_alpha_was_not_scaled_is_caught(case: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    edit_config(case, tmp_path / "adapter", lora_alpha=case.settings.alpha)
    found = measure(case, tmp_path, dtype)
    assert found.peft_weights == pytest.approx(0.5)
    assert not found.ok
    assert not found.peft.ok or dtype == torch.bfloat16


def test_an_adapter_that_misses_one_layer_is_caught(case: Case, tmp_path: Path) -> None:
    fewer = {name: item for name, item in case.adapter.items() if name != LAYER}
    export.write_adapter(fewer, case.settings, "base", tmp_path / "adapter")
    found = measure(case, tmp_path)
    assert not found.peft.ok
    assert found.peft_weights == float("inf")


def test_nan_is_not_parity() -> None:
    nan = float("nan")
    good = parity.Difference(0.0, 0.0, 1.0, 1.0)
    whole = parity.Parity("float32", "float32", 1, 1.0, 1.0, good, good, 0.5, 0.0)
    assert whole.ok
    assert not replace(whole, merged=replace(good, mean=nan)).ok
    assert not replace(whole, merged_weights=nan).ok
    assert not replace(whole, peft_weights=nan).ok


def test_measuring_leaves_the_layers_as_they_were() -> None:
    layer = torch.nn.Linear(4, 3)
    weight = layer.weight
    x = torch.ones(1, 4)
    with parity._rounded_again({"a": layer}, 0.1):
        moved = layer(x)
    assert layer.weight is weight
    assert not torch.equal(moved, layer(x))


def test_a_merge_may_lose_the_changes_that_are_too_small_for_its_precision() -> None:
    """In bfloat16 a change below half a unit is rounded away in its own direction; in float32 nothing is lost."""
    noise, difference = (2.0, 0.05), (7.0, 0.17)  # SmolLM2 after 12 steps; effect 3.9
    assert not parity._bounded(difference, noise).ok
    assert parity._bounded(difference, noise, lost=parity.LOST * torch.finfo(torch.bfloat16).eps * 3.9).ok
    assert not parity._bounded(difference, noise, lost=parity.LOST * torch.finfo(torch.float32).eps * 3.9).ok
