"""A model card says what an adapter is, and nothing of the machine."""

from dataclasses import replace

import pytest
import yaml

from olora_ray.adapter.portable import Card, model_card
from olora_ray.config.schema import Adapter, Source

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


@pytest.mark.parametrize(("rank", "taken"), [(1, 8), (8, 8), (27, 32), (48, 64), (129, 256), (257, 320), (512, 512)])
def test_the_command_for_vllm_has_a_rank_that_it_takes(rank: int, taken: int) -> None:
    text = model_card(replace(CARD, rank=rank))
    assert f"--max-lora-rank {taken} " in text
    assert f"a plain LoRA of rank {rank}\n" in text


def test_a_rank_that_vllm_does_not_take_is_told() -> None:
    text = model_card(replace(CARD, rank=1024))
    assert "vLLM takes no adapter of rank 1024, but up to 512" in text
    assert "vllm serve" not in text


def test_a_base_of_a_certain_commit_is_loaded_as_that() -> None:
    text = model_card(replace(CARD, revision="1f2e"))
    for part in (
        "`org/base` at revision `1f2e`, untouched",
        'AutoModelForCausalLM.from_pretrained("org/base", revision="1f2e"), "THIS_FOLDER")',
        "vllm serve org/base --revision 1f2e --enable-lora",
    ):
        assert part in text, part
    assert "revision" not in model_card(CARD)
