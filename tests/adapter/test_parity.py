"""The verdict: the exact checks decide, and its words name the error."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Adapter
from olora_ray.model import stored
from olora_ray.pipeline.merge import Worst
from olora_ray.pipeline.parity import (
    AsPeftReads,
    Difference,
    Folders,
    Logits,
    MergedFolder,
    Parity,
    measure_logits,
)
from tests import tiny
from tests.export_parts import IDS, Case, make_case

LOGITS = Logits(115, 40.0, 2.0, 1e-5, 0.04, Difference(1e-5, 3e-4), Difference(0.0, 3e-4))
RIGHT = Parity(
    MergedFolder(Worst(0.99, "a.up", "bfloat16"), ()), AsPeftReads(7e-8, "a.up", ()), LOGITS
)


def test_a_right_export_is_right_and_kept_as_json() -> None:
    assert RIGHT.ok
    stored = json.loads(json.dumps(RIGHT.to_json()))
    assert stored["ok"] is True
    assert stored["merged"]["weights"] == {"error": 0.99, "layer": "a.up", "stored": "bfloat16"}
    assert stored["logits"]["merged"]["bound"] == 3e-4


def test_a_run_without_merged_folder_or_logits_is_judged_by_the_adapter() -> None:
    assert Parity(None, RIGHT.peft, "too large").ok
    assert not Parity(None, replace(RIGHT.peft, error=2e-5), "too large").ok


def test_logits_refuse_only_what_else_seems_right() -> None:
    wrong = replace(RIGHT, logits=replace(LOGITS, merged=Difference(0.1, 3e-4)))
    assert wrong.problems() == [
        "the logits of the merged model differ from those of the trained model by 0.1, more than rounding can explain"
        " (0.0003)"
    ]


def test_nan_is_no_parity() -> None:
    nan = float("nan")
    assert not replace(RIGHT, merged=MergedFolder(Worst(nan, "a", "float32"), ())).ok
    assert not replace(RIGHT, peft=AsPeftReads(nan, "a", ())).ok
    assert not replace(RIGHT, logits=replace(LOGITS, peft=Difference(nan, 1.0))).ok


SETTINGS = Adapter(method="olora", rank=4, alpha=6)


def measure(case: Case, folder: Path, merged: bool = True) -> Logits | str:
    if merged and not (folder / "merged").exists():
        case.write_merged(folder / "merged")
    if not (folder / "adapter").exists():
        case.write_adapter(folder / "adapter")
    folders = Folders(case.base, folder / "merged" if merged else None, folder / "adapter", False)
    found = stored.groups(case.base, case.model, case.adapter)
    return measure_logits(
        folders, case.model, found, case.adapter, case.scale, [IDS], torch.device("cpu")
    )


def made(found: Logits | str) -> Logits:
    assert isinstance(found, Logits), found
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_left_but_float32s_own_noise(tmp_path: Path, dtype: torch.dtype) -> None:
    found = made(measure(make_case(tmp_path / "base", tiny.llama(dtype=dtype), SETTINGS), tmp_path))
    assert found.problems() == []
    assert found.tokens == IDS.numel()
    assert found.merged is not None
    assert found.peft is not None
    assert found.rounding is not None
    assert found.merged.median < 20 * found.noise, "also of a merge that was rounded to bfloat16"
    assert found.peft.median < 20 * found.noise
    assert (found.rounding > 100 * found.noise) == (dtype == torch.bfloat16)
    assert found.effect > 1000 * found.noise


def test_conv1d_and_a_run_without_a_merged_folder(tmp_path: Path) -> None:
    case = make_case(tmp_path / "base", tiny.gpt2(), SETTINGS)
    assert made(measure(case, tmp_path)).problems() == []
    found = made(measure(case, tmp_path, merged=False))
    assert found.merged is None
    assert found.problems() == []


def test_a_merged_folder_that_does_not_load_is_an_error_and_such_a_base_a_reason(
    tmp_path: Path,
) -> None:
    case = make_case(tmp_path / "base", tiny.llama(), SETTINGS)
    case.write_merged(tmp_path / "merged")
    (tmp_path / "merged" / "config.json").write_text("{}")
    with pytest.raises(UserError):
        measure(case, tmp_path)
    folders = Folders(tmp_path / "gone", None, tmp_path / "adapter", False)
    found = measure_logits(
        folders, case.model, [], case.adapter, case.scale, [IDS], torch.device("cpu")
    )
    assert str(found).startswith("the adapted model does not run here: ")
