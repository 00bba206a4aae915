"""The files of an exported folder load elsewhere, and do not say where they were made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoTokenizer

from olora_ray.config.schema import Adapter
from olora_ray.config.section import Source
from olora_ray.pipeline import merge, model_card, model_files
from olora_ray.pipeline.model_card import Card
from tests.export_parts import save_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a folder with a tokenizer that transformers 5 loaded from a folder and saved."""
    save_tokenizer(tmp_path / "first")
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "base")
    settings = tmp_path / "base" / "tokenizer_config.json"
    fields = json.loads(settings.read_text())
    assert fields["is_local"] is True, "what this is about"
    assert fields["tokenizer_class"] == "TokenizersBackend"
    settings.write_text(
        json.dumps({**fields, "extra_special_tokens": ["<s>"], "name_or_path": "/home/someone"})
    )
    return tmp_path / "base"


def test_a_tokenizer_is_copied_without_traces_of_a_machine(base: Path, tmp_path: Path) -> None:
    for folder, text in (
        (base, "new"),
        (tmp_path / "out", "old"),
    ):  # a merged folder has them already
        (folder / "additional_chat_templates").mkdir(parents=True)
        (folder / "additional_chat_templates" / "tools.jinja").write_text(text)
    (base / "model.safetensors").write_bytes(b"x")
    model_files.copy_tokenizer(base, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates",
    }
    fields = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert fields.keys().isdisjoint(
        {"is_local", "local_files_only", "name_or_path", "extra_special_tokens"}
    )
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<s>"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "new"


@pytest.mark.parametrize("code", [True, False])
def test_a_tokenizer_with_code_of_its_own_is_copied_with_it(
    base: Path, tmp_path: Path, code: bool
) -> None:
    (tmp_path / "out").mkdir()
    files = {"tokenization_ours.py", "sentencepiece.bpe.model"}
    for name in files:
        (base / name).write_text("x")
    if code:
        settings = base / "tokenizer_config.json"
        fields = json.loads(settings.read_text())
        settings.write_text(
            json.dumps({**fields, "auto_map": {"AutoTokenizer": ["tokenization_ours.Ours", None]}})
        )
    model_files.copy_tokenizer(base, tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there & files == (files if code else set())


def test_a_config_keeps_no_place_and_every_hub_id(tmp_path: Path) -> None:
    fields = {
        "_name_or_path": "/home/someone/model",
        "text_config": {"_name_or_path": "C:\\models\\a", "hidden_size": 8},
        "parts": [{"name_or_path": "./here"}],
        "vision_config": {"_name_or_path": "org/vision"},
        "auto_map": {"AutoConfig": "org/model--code.Config"},
        "generation_file": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model_files.make_portable(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text) == {
        "text_config": {"hidden_size": 8},
        "parts": [{}],
        "vision_config": {"_name_or_path": "org/vision"},
        "auto_map": {"AutoConfig": "org/model--code.Config"},
        "generation_file": None,
    }


def test_what_ends_an_answer_is_written_and_is_no_change_of_the_base(tmp_path: Path) -> None:
    """Without this a server continues after the end of an answer that only the chat template names."""
    for there in (True, False):
        base, merged = tmp_path / f"base-{there}", tmp_path / f"merged-{there}"
        for folder in (base, merged):
            folder.mkdir()
            (folder / "config.json").write_text('{"bos_token_id": 1}')
            save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
            if there:
                (folder / "generation_config.json").write_text(
                    '{"eos_token_id": 2, "temperature": 0.5}'
                )
        model_files.end_with(merged, (2, 7))
        found = json.loads((merged / "generation_config.json").read_text())
        assert found == (
            {"eos_token_id": [2, 7], "temperature": 0.5}
            if there
            else {"bos_token_id": 1, "eos_token_id": [2, 7]}
        )
        assert merge.changed(base, merged, []) == []
        (merged / "generation_config.json").write_text(json.dumps({**found, "temperature": 1.0}))
        assert merge.changed(base, merged, []) == [
            "generation_config.json differs from the base model's"
        ]


def test_positions_are_told_by_the_names_of_transformers_4_too() -> None:
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    for rope, old in (
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
        (scaled, {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ({"full_attention": scaled}, {}),
    ):
        shape = {"hidden_size": 8, "rope_parameters": rope}
        assert model_files.portable_config(shape) == {**shape, **old}
    named = {"rope_theta": 1.0, "rope_parameters": scaled}
    assert model_files.portable_config(named) == named


CARD = Card(
    base_name="org/base",
    base_digest="ab" * 32,
    adapter=Adapter(rank=16, alpha=32),
    rank=32,
    sources=(
        Source(path="/home/someone/data/chats.jsonl", format="messages"),
        Source(path="s3://secret-bucket/corpora/qa.parquet?region=x", format="alpaca", weight=2),
        Source(path="hf://org/data?split=train", format="text"),
    ),
    batch=8,
    max_length=512,
    steps=120,
    eval_loss=0.01716,
)


def test_a_card_says_what_the_adapter_is_and_how_to_load_it() -> None:
    text = model_card.model_card(CARD)
    _, metadata, body = text.split("---\n")
    assert yaml.safe_load(metadata) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "datasets": ["org/data"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "olora"],
    }
    for part in (
        "`org/base`, untouched",
        "ab" * 32,
        "olora, rank 16, alpha 32, on all-linear; written as a plain LoRA of rank 32",
        "`chats.jsonl` (messages), `qa.parquet` (alpaca, weight 2), `hf://org/data?split=train` (text)",
        "120 steps of 8 sequences of at most 512 tokens",
        "0.0172 per supervised token",
        'AutoModelForCausalLM.from_pretrained("org/base")',
        "vllm serve org/base --enable-lora --max-lora-rank 32",
    ):
        assert part in body, part


def test_a_card_tells_nothing_of_the_machine() -> None:
    text = model_card.model_card(
        replace(CARD, base_name="/home/someone/models/SmolLM2", eval_loss=None)
    )
    assert not any(word in text for word in ("/home", "someone", "secret-bucket", "None"))
    assert "`SmolLM2`, untouched; a folder on the machine that trained" in text
    assert yaml.safe_load(text.split("---\n")[1]).get("base_model") is None


def test_the_command_for_vllm_has_a_rank_that_it_takes() -> None:
    for rank, taken in ((1, 8), (8, 8), (27, 32), (129, 256), (257, 320), (512, 512)):
        text = model_card.model_card(replace(CARD, rank=rank))
        assert f"--max-lora-rank {taken} " in text
        assert f"a plain LoRA of rank {rank}\n" in text
    text = model_card.model_card(replace(CARD, rank=1024))
    assert "vLLM takes adapters up to rank 512, and this one has 1024" in text
    assert "vllm serve" not in text


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\nabout it", {"license": "mit"}),
        ("---\nlicense: [\n---\n", {}),
        ("about it", {}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {
                "license": "other",
                "license_name": "own",
                "license_link": "https://huggingface.co/org/base/blob/main/LICENSE",
            },
        ),
    ],
)
def test_the_license_is_that_of_the_base_or_given(
    tmp_path: Path, card: str, found: dict[str, str]
) -> None:
    assert model_card.license_of(tmp_path, "org/base", None) == {}
    (tmp_path / "README.md").write_text(card)
    assert model_card.license_of(tmp_path, "org/base", None) == found
    assert model_card.license_of(tmp_path, "org/base", "apache-2.0") == {"license": "apache-2.0"}
    assert "LICENSE" not in model_card.license_of(tmp_path, None, None).values(), (
        "a file that is not there"
    )
