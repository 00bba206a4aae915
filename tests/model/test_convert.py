"""Only tensors are read from a pickle, only if the config asks for it, and no code of a model runs without consent."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.model import load as load_module
from olora_ray.model import source
from tests import tiny
from tests.said import said


class Trap:
    """Creates the file `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with pickled weights only, like old models."""
    folder = tmp_path / "old"
    llama = tiny.llama(tie_word_embeddings=True)
    llama.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(llama.state_dict(), folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text("{}")
    torch.save({"lr": 0.1}, folder / "a_training_args.bin")
    return folder


def named(folder: Path, **changes: Any) -> Config:
    return tiny.config(model__name=str(folder), run__storage=str(folder.parent / "runs"), **changes)


def test_pickled_weights_are_refused_unless_asked_for(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no usable weights: .*model\.allow_pickle: true"):
        source.obtain(named(folder))
    assert not (folder.parent / "runs").exists()


def test_asked_for_they_become_safetensors_once(folder: Path, node: Path) -> None:
    config = named(folder, model__allow_pickle=True)
    with said() as lines:
        first = source.obtain(config)
        assert source.obtain(config) == first
    assert lines == ["model: converting pytorch_model.bin to safetensors, once on this machine"]
    there = sorted(file.name for file in Path(first.folder).iterdir())
    assert there == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    loaded: Any = load_module.load_model(first.folder, config.model, torch.device("cpu"))
    expected = tiny.llama(tie_word_embeddings=True).state_dict()
    stored = load_file(Path(first.folder) / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())
    assert all(name in expected for name, _ in loaded.named_parameters())


def test_what_was_changed_beside_the_weights_is_converted_again(folder: Path) -> None:
    config = named(folder, model__allow_pickle=True)
    before = source.obtain(config)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"rms_norm_eps": 0.5}))
    after = source.obtain(config)
    assert after.digest != before.digest
    assert (Path(after.folder) / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((Path(after.folder) / "config.json").read_text())["rms_norm_eps"] == 0.5
    assert source.obtain(config) == after


def test_weights_keep_their_precision_whatever_the_config_says(folder: Path) -> None:
    # Conversions of the first LLaMA have a float32 table beside float16 weights: all became float32.
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"dtype": "float16"}))
    base = source.obtain(named(folder, model__allow_pickle=True))
    expected = tiny.llama(tie_word_embeddings=True).state_dict()
    stored = load_file(Path(base.folder) / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    half = {name: tensor.half() for name, tensor in weights.items()}
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    torch.save(half | table, folder / "pytorch_model.bin")
    stored = load_file(
        Path(source.obtain(named(folder, model__allow_pickle=True)).folder) / "model.safetensors"
    )
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_pickled_tensors_without_a_place_are_told_or_refused(folder: Path) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    bias = "model.layers.0.self_attn.q_proj.bias"
    torch.save(
        weights | {bias: torch.zeros(64), "mtp.weight": torch.ones(2)}, folder / "pytorch_model.bin"
    )
    with said() as lines:
        source.obtain(named(folder, model__allow_pickle=True))
    assert f"does not use 2 tensors in the files of {folder}" in lines[-1]
    torch.save(weights | {bias: torch.ones(64)}, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"q_proj\.bias, but config\.json gives LlamaForCausalLM no such bias"
    ):
        source.obtain(named(folder, model__allow_pickle=True))
    packed = {"model.layers.0.mlp.up_proj.weight": torch.ones(112, 64, dtype=torch.int8)}
    torch.save(weights | packed, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"up_proj\.weight as int8, but .* no quantization_config"):
        source.obtain(named(folder, model__allow_pickle=True))


def test_a_pickle_that_holds_more_than_tensors_runs_nothing(folder: Path, tmp_path: Path) -> None:
    # In torch's format, and in the old one.
    mark, file = tmp_path / "it-ran", folder / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    file.write_bytes(pickle.dumps({"trap": Trap(mark)}))
    with pytest.raises(UserError, match=r"model\.name: "):
        source.obtain(named(folder, model__allow_pickle=True))
    torch.save({**weights, "trap": Trap(mark)}, file)
    with pytest.raises(UserError, match="hold more than tensors"):
        source.obtain(named(folder, model__allow_pickle=True))
    assert not mark.exists()
    torch.load(file, weights_only=False)  # the trap works
    assert mark.exists()


def test_a_pickle_without_a_layer_is_refused(folder: Path) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del weights["model.norm.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no weights for model\.norm\.weight"):
        source.obtain(named(folder, model__allow_pickle=True))


CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OursConfig(LlamaConfig):
    model_type = "ours"
class Ours(LlamaForCausalLM):
    config_class = OursConfig
"""


def test_code_of_a_model_runs_only_where_it_is_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers copies such code to this folder.
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(tmp_path)  # afterwards the path is as it was
    mark = tmp_path / "it-ran"
    tiny.llama().save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    tokenizer = {
        "tokenizer_class": "OurTokenizer",
        "auto_map": {"AutoTokenizer": ["ours.OurTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "ours.py").write_text(CODE.format(mark=str(mark)))
    shape = json.loads((folder / "config.json").read_text())
    shape |= {
        "model_type": "ours",
        "auto_map": {"AutoConfig": "ours.OursConfig", "AutoModelForCausalLM": "ours.Ours"},
    }
    (folder / "config.json").write_text(json.dumps(shape))
    config = named(folder)
    base = source.obtain(config)
    for load in (load_module.load_tokenizer, load_module.skeleton):
        with pytest.raises(
            UserError, match=r"needs its own Python code.*model\.trust_remote_code: true"
        ):
            load(base, config.model)
    with pytest.raises(UserError, match="needs its own Python code"):
        load_module.load_model(folder, config.model, torch.device("cpu"))
    assert not mark.exists()
    trusted = named(folder, model__trust_remote_code=True).model
    assert type(load_module.skeleton(base, trusted)).__name__ == "Ours"
    assert mark.exists()
