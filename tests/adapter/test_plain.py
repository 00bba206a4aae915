"""An exported adapter that is read back and merged is the merged model of its run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from olora_ray.adapter import peft_folder
from olora_ray.adapter.merge import write_merged
from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Adapter
from tests import tiny
from tests.export_parts import Case, make_case
from tests.tiny import SMALL
from tests.tiny import of_kind as family


def exported(folder: Path, model: Any, settings: Adapter) -> tuple[Case, Path]:
    case = make_case(folder / "base", model, settings)
    out = folder / "adapter"
    write_adapter(case.adapter, settings, "base", out, case.model)
    return case, out


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny.llama, Adapter(rank=4, alpha=8)),
        (tiny.llama, Adapter(rank=4, alpha=8, method="lora")),
        (tiny.llama, Adapter(rank=4, alpha=8, rank_stabilized=True)),
        (tiny.gpt2, Adapter(rank=4, alpha=6)),
        (lambda: family("mixtral", SMALL | {"num_local_experts": 4}), Adapter(rank=4, alpha=6)),
    ],
)
def test_merging_what_was_read_is_merging_what_was_trained(make: Any, settings: Adapter, tmp_path: Path) -> None:
    case, folder = exported(tmp_path, make(), settings)
    adapter, scale = peft_folder.read(folder, case.model)
    assert adapter.keys() == case.adapter.keys()
    write_merged(case.base, adapter, scale, tmp_path / "again", case.model)
    write_merged(case.base, case.adapter, case.scale, tmp_path / "merged", case.model)
    again, merged, base = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "merged", "base"))
    torch.testing.assert_close(again, merged, atol=1e-6, rtol=1e-5)
    assert any(not torch.allclose(merged[name], base[name], atol=1e-3) for name in merged)


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "LOHA"},
        {"bias": "all"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
    ],
)
def test_an_adapter_of_another_form_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    case, folder = exported(tmp_path, tiny.llama(), Adapter(rank=4, alpha=8))
    file = folder / peft_folder.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(UserError, match="is not a plain LoRA, so it cannot be merged here"):
        peft_folder.read(folder, case.model)


@pytest.mark.parametrize("change", ["one less", "one more"])
def test_matrices_that_do_not_pair_up_are_refused(change: str, tmp_path: Path) -> None:
    case, folder = exported(tmp_path, tiny.llama(), Adapter(rank=4, alpha=8))
    tensors = load_file(folder / peft_folder.WEIGHTS)
    if change == "one less":
        del tensors[next(name for name in tensors if "lora_B" in name)]
    else:
        tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / peft_folder.WEIGHTS)
    with pytest.raises(UserError, match="does not have a lora_A and a lora_B of each layer, and no more"):
        peft_folder.read(folder, case.model)
