"""No pickle is read, and no code of a model runs without consent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.model import load as load_module
from olora_ray.model import source
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with pickled weights only, like old models."""
    folder = tmp_path / "old"
    llama = tiny.llama()
    llama.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(llama.state_dict(), folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def named(folder: Path, **changes: Any) -> Config:
    return tiny.config(model__name=str(folder), run__storage=str(folder.parent / "runs"), **changes)


def test_pickled_weights_are_refused_with_the_converter_of_the_hub(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.name: .*huggingface\.co/spaces/safetensors/convert"
    ):
        source.obtain(named(folder))
    assert not (folder.parent / "runs").exists()


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
    with pytest.raises(UserError):
        load_module.load_model(folder, config.model, torch.device("cpu"))
    assert not mark.exists()
    trusted = named(folder, model__trust_remote_code=True).model
    assert type(load_module.skeleton(base, trusted)).__name__ == "Ours"
    assert mark.exists()
