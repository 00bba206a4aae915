import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Adapter
from olora_ray.model import stored
from olora_ray.pipeline import merge
from tests import tiny
from tests.export_parts import (
    Case,
    logits,
    make_case,
    make_stacked_case,
    save_tokenizer,
    skeleton_of,
)
from tests.families import zoo
from tests.families.variants import ALL, MIXTURES

SETTINGS = Adapter(method="olora", rank=4, alpha=6)


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return make_case(tmp_path / "base", tiny.llama(), SETTINGS)


def load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("family", [*MIXTURES, "phi3", "gemma3"])
def test_what_transformers_puts_together_is_taken_apart_again(tmp_path: Path, family: str) -> None:
    """Experts stored one by one, fused, transposed or renamed: the files are the base's plus the change."""
    case = make_stacked_case(
        tmp_path / "base", zoo.make(ALL[family], attention="eager"), Adapter(rank=3, alpha=6)
    )
    case.write_merged(tmp_path / "merged")
    found = stored.groups(case.base, case.model, case.adapter)
    assert {layer for group in found for layer in group.layers} == set(case.adapter)
    assert (
        merge.check_weights(case.base, tmp_path / "merged", found, case.adapter, case.scale).error
        < 1
    )
    assert merge.changed(case.base, tmp_path / "merged", found) == []
    torch.testing.assert_close(logits(load(tmp_path / "merged")), case.logits, atol=2e-5, rtol=0)


def test_weights_are_rounded_once_to_the_stored_precision(tmp_path: Path) -> None:
    case = make_case(tmp_path / "base", tiny.llama(dtype=torch.bfloat16), SETTINGS)
    before = load_file(case.base / "model.safetensors")
    after = load_file(case.write_merged(tmp_path / "merged") / "model.safetensors")
    changed = {f"{name}.weight" for name in case.adapter}
    for name, weight in before.items():
        assert after[name].dtype == torch.bfloat16
        if name in changed:
            delta = case.adapter[name.removesuffix(".weight")].delta(case.scale)
            assert torch.equal(after[name], (weight.float() + delta).bfloat16())
            assert not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight)


def test_shards_keep_their_layout_and_other_files_come_along(tmp_path: Path) -> None:
    case = make_case(tmp_path / "base", tiny.llama(), SETTINGS, shard="100KB")
    save_tokenizer(case.base)
    for name in ("pytorch_model.bin", "README.md", "extra.safetensors", "LICENSE"):
        (case.base / name).write_bytes(b"x")
    out = case.write_merged(tmp_path / "merged")
    shards = sorted(path.name for path in case.base.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    names = {path.name for path in out.iterdir()} - set(shards)
    assert names >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
    }
    assert names.isdisjoint({"pytorch_model.bin", "README.md"})
    assert (
        json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    assert (out / "model.safetensors.index.json").read_bytes() == (
        case.base / "model.safetensors.index.json"
    ).read_bytes()
    with safe_open(out / shards[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    torch.testing.assert_close(logits(load(out)), case.logits, atol=2e-5, rtol=0)


def test_a_checkpoint_without_the_models_prefix(tmp_path: Path) -> None:
    # As gpt2 lies on the hub: h.0.attn.c_attn.weight for transformer.h.0.attn.c_attn.
    case = make_case(tmp_path / "base", tiny.gpt2(), SETTINGS)
    file = case.base / "model.safetensors"
    short = {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}
    save_file(short, file, metadata={"format": "pt"})
    torch.testing.assert_close(
        logits(load(case.write_merged(tmp_path / "merged"))), case.logits, atol=2e-5, rtol=0
    )


Q = "model.layers.0.self_attn.q_proj.weight"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop(Q), rf"cannot merge {re.escape(Q[:-7])}: .* has no weight"),
        (
            lambda tensors: tensors.update({f"a.{Q}": tensors.pop(Q), f"b.{Q}": torch.ones(2)}),
            "has its weight twice",
        ),
        (
            lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}),
            rf"{re.escape(Q)} is stored as I8",
        ),
    ],
    ids=["missing", "twice", "quantised"],
)
def test_a_weight_that_cannot_be_merged_is_named(
    llama: Case, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], problem: str
) -> None:
    rewrite(llama.base, change)
    with pytest.raises(UserError, match=problem):
        llama.write_merged(tmp_path / "merged")


def test_tied_weights_are_named(llama: Case, tmp_path: Path) -> None:
    config = json.loads((llama.base / "config.json").read_text())
    (llama.base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with_head = {**llama.adapter, "lm_head": llama.adapter["model.layers.0.self_attn.q_proj"]}
    with pytest.raises(UserError):
        merge.write_merged(llama.base, with_head, 1.0, tmp_path / "merged", skeleton_of(llama.base))
    first, second = (f"model.layers.{i}.mlp.up_proj" for i in range(2))
    llama.model.get_submodule(second).weight = llama.model.get_submodule(first).weight
    with pytest.raises(
        UserError, match=f"cannot merge {re.escape(first)}: its weight is tied to another layer"
    ):
        llama.write_merged(tmp_path / "merged")


def test_an_old_export_stays_until_the_new_one_is_complete(llama: Case, tmp_path: Path) -> None:
    out = llama.write_merged(tmp_path / "merged")
    (out / "mark").write_text("old")
    rewrite(llama.base, lambda tensors: tensors.pop(Q))
    with pytest.raises(UserError):
        llama.write_merged(out)
    assert (out / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"], "no leftovers"
    (tmp_path / ".merged.0.tmp").mkdir()  # a killed process left it
    rest = {n: w for n, w in llama.adapter.items() if "q_proj" not in n}
    merge.write_merged(llama.base, rest, 1.0, out, llama.model)
    assert not (out / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_right_merge_is_right_and_what_is_not_the_bases_is_named(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    case = make_case(tmp_path / "base", tiny.llama(dtype=dtype), SETTINGS, shard="100KB")
    folder = case.write_merged(tmp_path / "merged")
    groups = stored.groups(case.base, case.model, case.adapter)

    def changed() -> list[str]:
        return merge.changed(case.base, folder, groups)

    found = merge.check_weights(case.base, folder, groups, case.adapter, case.scale)
    assert 0 < found.error <= 1
    assert f"torch.{found.stored}" == str(dtype)
    assert changed() == []

    (folder / "old.safetensors").write_bytes(b"")
    assert "old.safetensors" in changed()[0]
    (folder / "old.safetensors").unlink()

    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert changed() == ["config.json differs from the base model's"]
    config.write_text(text)

    place = stored.tensors(folder)["model.norm.weight"]
    content = bytearray((folder / place.file).read_bytes())
    content[place.start + 7] ^= 1
    (folder / place.file).write_bytes(content)
    byte = f"byte {place.start + 7} (model.norm.weight)"
    assert changed() == [f"{place.file}: {byte} differs from the base model's"]
