"""What an exported adapter tells others of its base, and what lies beside it."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from olora_ray.config.load import build
from olora_ray.config.schema import Config
from olora_ray.data import chat_template
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.export import _complete, _public_name
from olora_ray.train.checkpoint import TrainState
from tests.export_parts import save_tokenizer


def config(name: str) -> Config:
    return build(
        {"run": {"name": "a"}, "model": {"name": name}, "data": {"train": [{"path": "/home/someone/data/a.jsonl"}]}}
    )


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/model", "org/model"),
        ("package://some/model.gguf", "/runs/models/model-1"),
        ("s3://bucket/model", "/runs/models/model-1"),
        ("models:/name@champion", "/runs/models/model-1"),
    ],
)
def test_a_hub_id_stays_and_everything_else_is_a_folder(name: str, public: str) -> None:
    assert _public_name(BaseModel(name, "/runs/models/model-1", "")) == public


def test_a_file_of_weights_is_named_by_the_folder_that_others_can_load(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    assert _public_name(BaseModel(str(tmp_path / "model.gguf"), "/runs/models/model-1", "")) == "/runs/models/model-1"
    assert _public_name(BaseModel(str(tmp_path), str(tmp_path), "")) == str(tmp_path)


@pytest.mark.parametrize("template", [True, False])
def test_an_adapters_folder_has_its_tokenizer_template_and_card(tmp_path: Path, template: bool) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    save_tokenizer(base)
    if not template:
        (base / "chat_template.jinja").unlink()
    out.mkdir()
    state = TrainState(step=9, best_step=6, best_loss=0.25)
    _complete(config(str(base)), BaseModel(str(base), str(base), "cafe"), state, out, 32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    expected = (base / "chat_template.jinja").read_text() if template else chat_template.DEFAULT
    assert tokenizer.chat_template == expected
    card = (out / "README.md").read_text()
    assert "Training: 6 steps" in card
    assert "Held-out loss: 0.2500" in card
    assert "`a.jsonl` (messages)" in card
    assert str(tmp_path) not in card
    assert "/home" not in card
    assert "is_local" not in json.loads((out / "tokenizer_config.json").read_text())


def test_a_processors_template_is_none_of_the_tokenizer(tmp_path: Path) -> None:
    """Of a base for pictures and text: no tokenizer reads it, so the training had the default one."""
    base, out = tmp_path / "base", tmp_path / "adapter"
    save_tokenizer(base)
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": "another"}))
    out.mkdir()
    _complete(config(str(base)), BaseModel(str(base), str(base), "cafe"), TrainState(step=1), out, 8)
    assert AutoTokenizer.from_pretrained(out).chat_template == chat_template.DEFAULT
    assert not (out / "chat_template.json").exists()


def test_an_adapters_tokenizer_cuts_text_as_the_bases(tmp_path: Path) -> None:
    """OLMo, Granite and Phi-4 name GPT-2's class, which cuts in its own way without a config.json beside it."""
    inner = Tokenizer(
        BPE({"</s>": 0, **{byte: 1 + number for number, byte in enumerate(sorted(ByteLevel.alphabet()))}}, [])
    )
    inner.pre_tokenizer = Sequence([Split(Regex(r"\p{N}{1,3}"), "isolated"), ByteLevel(False, use_regex=False)])
    inner.add_special_tokens(["</s>"])
    base, out = tmp_path / "base", tmp_path / "adapter"
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    (base / "config.json").write_text(json.dumps({"model_type": "olmo2"}))
    own = AutoTokenizer.from_pretrained(base).backend_tokenizer
    assert json.loads(own.to_str())["pre_tokenizer"]["type"] == "Sequence", "what this is about"
    out.mkdir()
    _complete(config(str(base)), BaseModel(str(base), str(base), "cafe"), TrainState(step=1), out, 8)
    assert AutoTokenizer.from_pretrained(out).backend_tokenizer.to_str() == own.to_str()


def test_the_card_names_the_commit_of_a_base_from_the_hub_only(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_tokenizer(base)
    for name, named in (("org/model", True), (str(base), False)):
        settings = config(name)
        model = settings.model.model_copy(update={"revision": "1f2e"})
        out = tmp_path / f"adapter-{named}"
        out.mkdir()
        found = BaseModel(name, str(base), "cafe")
        _complete(settings.model_copy(update={"model": model}), found, TrainState(step=1), out, 8)
        assert ('revision="1f2e"' in (out / "README.md").read_text()) == named
