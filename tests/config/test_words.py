"""Words of other tools lead to our fields."""

import re

import pytest

from olora_ray.config.load import EXPLAINED, PLAIN
from olora_ray.config.load import spelling_advice as advice
from olora_ray.config.schema import Config


def there(field: str) -> bool:
    """Whether a dotted name is a field of the config."""
    section, name, *inner = field.split(".")
    return name in getattr(Config.model_fields[section].annotation, "model_fields", {}) and inner[
        :1
    ] in ([], ["0"])


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("lora_alpha", "adapter.alpha"),
        ("r", "adapter.rank"),
        ("learning_rate", "train.lr"),
        ("per_device_train_batch_size", "train.micro_batch"),
        ("max-seq-length", "data.max_length"),
        ("rank", "adapter.rank"),
        ("epochs", "train.epochs"),
    ],
)
def test_a_word_of_another_tool_leads_to_our_field(word: str, field: str) -> None:
    assert advice(word) == f"use {field}"
    assert there(field)


def test_every_advice_names_a_field_that_there_is() -> None:
    named = re.findall(
        r"\b(?:train|data|model|tracking|adapter)\.\w+", " ".join(EXPLAINED.values())
    )
    assert len(named) > 8
    assert [field for field in (*PLAIN, *named) if not there(field)] == []
