"""An exported folder says what it is, and its tokenizer loads elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from olora_ray.adapter import sharing
from olora_ray.adapter.sharing import Card, model_card
from olora_ray.config.schema import Adapter, Source
from tests.export_parts import save_tokenizer

CARD = Card(
    base_name="org/base",
    base_digest="ab" * 32,
    adapter=Adapter(rank=16, alpha=32),
    rank=32,
    sources=(
        Source(path="/home/someone/data/chats.jsonl"),
        Source(path="s3://secret-bucket/corpora/qa.parquet?region=x", format="alpaca", weight=2),
        Source(path="hf://org/data?split=train", format="text"),
    ),
    max_length=512,
    steps=120,
    eval_loss=0.01716,
)


def test_a_card_says_what_the_adapter_is_and_how_to_load_it() -> None:
    text = model_card(CARD)
    _, metadata, body = text.split("---\n")
    assert yaml.safe_load(metadata) == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "olora"],
    }
    for part in (
        "`org/base`, untouched",
        "ab" * 32,
        "olora, rank 16, alpha 32; written as a plain LoRA of rank 32",
        "`chats.jsonl` (messages), `qa.parquet` (alpaca, weight 2), `hf://org/data?split=train` (text)",
        "120 steps, sequences of at most 512 tokens",
        "0.0172 per supervised token",
        'AutoModelForCausalLM.from_pretrained("org/base")',
        "vllm serve org/base --enable-lora --max-lora-rank 32",
    ):
        assert part in body, part


def test_a_card_tells_nothing_of_the_machine() -> None:
    text = model_card(replace(CARD, base_name="/home/someone/models/SmolLM2", eval_loss=None))
    assert not any(word in text for word in ("/home", "someone", "secret-bucket", "None"))
    assert "`SmolLM2`, untouched; a folder where this was trained" in text
    assert yaml.safe_load(text.split("---\n")[1]).get("base_model") is None


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a tokenizer as transformers 5 writes one that it loaded from a folder."""
    save_tokenizer(tmp_path / "first")
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "base")
    settings = tmp_path / "base" / "tokenizer_config.json"
    fields = json.loads(settings.read_text())
    assert fields["is_local"] is True, "what this is about"
    assert fields["tokenizer_class"] == "TokenizersBackend"
    settings.write_text(json.dumps({**fields, "extra_special_tokens": ["<s>"], "name_or_path": "/home/someone"}))
    return tmp_path / "base"


def test_a_tokenizer_is_copied_without_traces_of_a_machine(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("x")
    (base / "model.safetensors").write_bytes(b"x")
    sharing.copy_tokenizer(base, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"}
    fields = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert fields.keys().isdisjoint({"is_local", "local_files_only", "name_or_path", "extra_special_tokens"})
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<s>"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_copied_tokenizer_says_what_the_bases_says(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    sharing.copy_tokenizer(base, tmp_path / "out")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", base))
    chat = [{"role": "user", "content": "AB C"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert ours("AB C").input_ids == theirs("AB C").input_ids
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_a_folder_without_a_tokenizer_stays_as_it_is(tmp_path: Path) -> None:
    sharing.make_portable(tmp_path)
    assert not list(tmp_path.iterdir())
