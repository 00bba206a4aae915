"""PEFT reads the adapter folder as the trained adapter, also in families whose names it rewrites."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from olora_ray.adapter.peft_folder import read_adapter
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Adapter
from olora_ray.pipeline.parity import check_adapter
from tests import tiny
from tests.export_parts import Case, logits, make_case, make_stacked_case
from tests.families import zoo
from tests.families.variants import ALL, MIXTURES

METHODS = [
    Adapter(method="olora", rank=4, alpha=6),
    Adapter(method="olora", rank=4, alpha=6, rank_stabilized=True),
    Adapter(method="lora", rank=4, alpha=6),
    Adapter(method="pissa", rank=4, alpha=6),
    Adapter(method="orthogonal", rank=4, alpha=6),
    Adapter(method="nora", rank=4, alpha=6),
]


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return make_case(tmp_path / "base", tiny.llama(), METHODS[0])


def load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def from_peft(case: Case, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load(case.base), folder).eval())


def assert_reads_back(case: Case, folder: Path) -> None:
    again, scale = read_adapter(folder, case.model)
    assert again.keys() == case.adapter.keys()
    for name, item in case.adapter.items():
        torch.testing.assert_close(
            again[name].delta(scale), item.delta(case.scale), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings", METHODS, ids=lambda item: f"{item.method}-{item.rank_stabilized}"
)
def test_peft_says_what_the_adapted_model_says(
    tmp_path: Path, family: str, settings: Adapter
) -> None:
    case = make_case(tmp_path / "base", getattr(tiny, family)(), settings)
    folder = case.write_adapter(tmp_path / "adapter")
    torch.testing.assert_close(from_peft(case, folder), case.logits, atol=2e-5, rtol=0)
    assert check_adapter(folder, case.model, case.adapter, case.scale).ok
    assert_reads_back(case, folder)


@pytest.mark.parametrize("family", [*MIXTURES, "phi3", "gemma3"])
def test_experts_and_names_that_peft_rewrites_are_read_as_they_were_trained(
    tmp_path: Path, family: str
) -> None:
    case = make_stacked_case(
        tmp_path / "base", zoo.make(ALL[family], attention="eager"), Adapter(rank=3, alpha=6)
    )
    folder = case.write_adapter(tmp_path / "adapter")
    found = check_adapter(folder, case.model, case.adapter, case.scale)
    assert found.ok, found
    torch.testing.assert_close(from_peft(case, folder), case.logits, atol=5e-5, rtol=0)
    assert_reads_back(case, folder)


def test_some_of_the_names_that_peft_rewrites_are_enough(tmp_path: Path) -> None:
    """PEFT refuses gate_proj without up_proj if it takes them for experts."""
    model = zoo.make(ALL["deepseek_v3"])
    names = [
        name
        for name, _ in model.named_modules()
        if name.endswith(("mlp.gate_proj", "shared_experts.down_proj"))
    ]
    case = make_stacked_case(tmp_path / "base", model, Adapter(rank=3, alpha=6), names)
    found = check_adapter(
        case.write_adapter(tmp_path / "adapter"), case.model, case.adapter, case.scale
    )
    assert found.ok, found


def test_the_adapter_folder_is_what_peft_itself_writes(llama: Case, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = llama.write_adapter(tmp_path / "adapter")
    PeftModel.from_pretrained(load(llama.base), folder).save_pretrained(tmp_path / "again")
    ours, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (folder, tmp_path / "again")
    )
    assert set(ours) <= set(theirs)
    assert (ours["r"], ours["lora_alpha"], ours["use_rslora"]) == (8, 12, False)
    assert ours["target_modules"] == list(llama.adapter), "full names: nothing else can match"
    assert "target_parameters" not in ours, "older versions of PEFT do not know it"


def edit(folder: Path, **fields: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


LAYER = "model.layers.1.mlp.down_proj"


def test_matrices_that_are_missing_or_left_over_are_told(llama: Case, tmp_path: Path) -> None:
    folder = llama.write_adapter(tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors, key = load_file(file), f"base_model.model.{LAYER}.lora_B.weight"
    save_file({name: value for name, value in tensors.items() if name != key}, file)
    assert check_adapter(folder, llama.model, llama.adapter, llama.scale).problems == (
        f"PEFT finds no matrices for {LAYER}",
    )
    with pytest.raises(UserError):
        read_adapter(folder, llama.model)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, file)
    assert "more than" in check_adapter(folder, llama.model, llama.adapter, llama.scale).problems[0]
    with pytest.raises(UserError):
        read_adapter(folder, llama.model)


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
def test_an_adapter_of_another_form_is_not_read(
    llama: Case, tmp_path: Path, fields: dict[str, object]
) -> None:
    folder = llama.write_adapter(tmp_path / "adapter")
    edit(folder, **fields)
    with pytest.raises(UserError):
        read_adapter(folder, llama.model)


def test_what_peft_does_not_load_is_one_line(llama: Case, tmp_path: Path) -> None:
    folder = llama.write_adapter(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text("{}")
    found = check_adapter(folder, llama.model, llama.adapter, llama.scale)
    assert found.problems[0].startswith("PEFT does not load it: ")
    assert not found.ok
