"""What an exported folder tells others of its base, and what lies beside it: template, tokenizer, end tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from olora_ray.config.load import build
from olora_ray.config.schema import Config
from olora_ray.data import chat_template
from olora_ray.model.load import load_tokenizer
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.export import complete, give_template, public_name
from olora_ray.train.checkpoint import TrainState
from tests import tiny
from tests.data import small_tokenizers
from tests.export_parts import save_tokenizer


def config(name: str) -> Config:
    return build(
        {
            "run": {"name": "a"},
            "train": {"objective": "tokens"},
            "model": {"name": name},
            "data": {"train": [{"path": "/home/someone/data/a.jsonl", "format": "messages"}]},
        }
    )


def completed(model: BaseModel, state: TrainState, out: Path, config: Config) -> Path:
    """An adapter's folder that was given what lies beside its matrices."""
    out.mkdir()
    complete(config, model, state, out, 8, load_tokenizer(model, config.model))
    return out


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
    assert public_name(BaseModel(name, "/runs/models/model-1", "")) == public


@pytest.mark.parametrize("template", [True, False])
def test_an_adapters_folder_has_its_tokenizer_template_and_card(
    tmp_path: Path, template: bool
) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    save_tokenizer(base)
    if not template:
        (base / "chat_template.jinja").unlink()
    state = TrainState(step=9, best_step=6, best_loss=0.25)
    completed(BaseModel(str(base), str(base), "cafe"), state, out, config(str(base)))
    tokenizer = AutoTokenizer.from_pretrained(out)
    expected = (base / "chat_template.jinja").read_text() if template else chat_template.DEFAULT
    assert tokenizer.chat_template == expected
    card = (out / "README.md").read_text()
    assert ("--chat-template" in card) == (not template)
    assert "Training: 6 steps" in card
    assert "Held-out loss: 0.2500" in card
    assert "`a.jsonl` (messages)" in card
    assert str(tmp_path) not in card
    assert "/home" not in card
    assert "is_local" not in json.loads((out / "tokenizer_config.json").read_text())


def test_a_template_of_ones_own_is_that_of_the_export(tmp_path: Path) -> None:
    """Whatever the base has: one in its settings, one for tools, one of its processor."""
    base = tmp_path / "base"
    save_tokenizer(base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": "another"})
    )
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("another")
    model, own = BaseModel(str(base), str(base), "cafe"), config(str(base))
    for name, template in (("with", "own"), ("without", None)):
        (tmp_path / name).mkdir()
        complete(
            own,
            model,
            TrainState(step=1),
            tmp_path / name,
            8,
            load_tokenizer(model, own.model),
            template,
        )
        card = (tmp_path / name / "README.md").read_text()
        assert ("--chat-template THIS_FOLDER/chat_template.jinja" in card) == (template is not None)
    assert AutoTokenizer.from_pretrained(tmp_path / "with").chat_template == "own"


def test_an_adapters_tokenizer_cuts_text_as_the_bases(tmp_path: Path) -> None:
    """OLMo, Granite and Phi-4 name GPT-2's class, which cuts in its own way without a config.json beside it."""
    inner = Tokenizer(
        BPE(
            {
                "</s>": 0,
                **{byte: 1 + number for number, byte in enumerate(sorted(ByteLevel.alphabet()))},
            },
            [],
        )
    )
    inner.pre_tokenizer = Sequence(
        [Split(Regex(r"\p{N}{1,3}"), "isolated"), ByteLevel(False, use_regex=False)]
    )
    inner.add_special_tokens(["</s>"])
    base, out = tmp_path / "base", tmp_path / "adapter"
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"})
    )
    (base / "config.json").write_text(json.dumps({"model_type": "olmo2"}))
    own = AutoTokenizer.from_pretrained(base).backend_tokenizer
    assert json.loads(own.to_str())["pre_tokenizer"]["type"] == "Sequence", "what this is about"
    completed(BaseModel(str(base), str(base), "cafe"), TrainState(step=1), out, config(str(base)))
    assert AutoTokenizer.from_pretrained(out).backend_tokenizer.to_str() == own.to_str()


def exported(folder: Path, begin: bool, **source: Any) -> str | None:
    """The template of the merged folder of a base whose tokenizer has none."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = small_tokenizers.byte_level(False)
    if begin:
        inner.post_processor = TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    for name in ("base", "merged"):
        tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
        )
        tokenizer.save_pretrained(folder / name)
    give_template(
        tiny.config(data__train=[{"path": "x.jsonl", **source}]), tokenizer, folder / "merged"
    )
    file = folder / "merged" / "chat_template.jinja"
    return file.read_text() if file.is_file() else None


@pytest.mark.parametrize(
    ("begin", "source", "template"),
    [
        (False, {"format": "messages"}, chat_template.DEFAULT),
        (True, {"format": "messages"}, "{{ bos_token }}" + chat_template.DEFAULT),
        (False, {"format": "prompt_completion", "chat": True}, chat_template.DEFAULT),
        (False, {"format": "prompt_completion"}, None),
    ],
)
def test_chats_get_the_template_that_was_trained_and_texts_get_none(
    begin: bool, source: dict[str, Any], template: str | None, tmp_path: Path
) -> None:
    assert exported(tmp_path, begin, **source) == template
