"""Which models can take several examples in one sequence, by their structure."""

from typing import Any

import pytest
import torch

from olora_ray.model.packing import why_apart
from tests import tiny
from tests.tiny import SMALL, of_kind

APART: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "keeps a state"),
    "lfm2": (SMALL | {"full_attn_idxs": [1]}, "keeps a state"),
    "bloom": ({"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "takes no positions"),
    "falcon": (SMALL | {"alibi": True}, "takes no positions"),
    "recurrent_gemma": (SMALL | {"num_hidden_layers": 3, "lru_width": 32}, "keeps a state"),
}


@pytest.mark.parametrize("kind", APART)
def test_models_that_carry_something_over(kind: str) -> None:
    sizes, reason = APART[kind]
    with torch.device("meta"):
        assert reason in str(why_apart(of_kind(kind, sizes)))


def test_convolutions_of_an_unknown_family() -> None:
    made = tiny.llama()
    made.model.layers[0].mixer = torch.nn.Conv1d(64, 64, 4)
    assert why_apart(made) == "has convolutions over the tokens"


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "mixtral", "falcon"])
def test_attention_alone_is_kept_inside_of_an_example(kind: str) -> None:
    assert why_apart(of_kind(kind, SMALL)) is None
    assert why_apart(tiny.gpt2()) is None


def test_a_tower_for_images_may_have_convolutions() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        made = of_kind("gemma3", {"text_config": SMALL | {"head_dim": 8}, "vision_config": vision})
        assert any(isinstance(module, torch.nn.Conv2d) for module in made.modules())
        assert why_apart(made) is None
